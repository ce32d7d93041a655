//! Users and groups of the guest, from its files.

use std::fs;

use rekindle_agent::{Refusal, Why};
use rustix::process::{Gid, Uid};

use crate::sys::Identity;

/// A user of the guest.
#[derive(Debug)]
pub(crate) struct User {
    pub(crate) identity: Identity,
    /// The home directory; `/` of a number that the guest's files do not know, as in containers.
    pub(crate) home: String,
}

/// Who `user`, `uid`, `user:group` or any mixture of these is.
pub(crate) fn user(wanted: &str) -> Result<User, Refusal> {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let group = fs::read_to_string("/etc/group").unwrap_or_default();
    look_up(wanted, &passwd, &group)
}

fn look_up(wanted: &str, passwd: &str, group: &str) -> Result<User, Refusal> {
    let (user, group_wanted) = match wanted.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (wanted, None),
    };
    let entry = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.first() == Some(&user) || fields.get(2) == Some(&user));
    let field = |at: usize| entry.as_ref()?.get(at)?.parse::<u32>().ok();
    let uid = field(2)
        .or_else(|| user.parse().ok())
        .ok_or_else(|| missing("user", user))?;
    let gid = match group_wanted {
        Some(name) => gid_of(name, group).ok_or_else(|| missing("group", name))?,
        None => field(3).unwrap_or(uid),
    };
    let mut groups = vec![Gid::from_raw(gid)];
    let name = entry.as_ref().and_then(|fields| fields.first()).copied();
    // A group that was asked for is the only one, as in containers.
    if let (Some(name), None) = (name, group_wanted) {
        groups.extend(groups_of(name, group).filter(|other| other.as_raw() != gid));
    }
    let home = entry.as_ref().and_then(|fields| fields.get(5)).copied();
    Ok(User {
        identity: Identity {
            uid: Uid::from_raw(uid),
            gid: Gid::from_raw(gid),
            groups,
        },
        home: home
            .filter(|home| !home.is_empty())
            .unwrap_or("/")
            .to_owned(),
    })
}

fn gid_of(wanted: &str, group: &str) -> Option<u32> {
    group
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.first() == Some(&wanted) || fields.get(2) == Some(&wanted))
        .and_then(|fields| fields.get(2)?.parse().ok())
        .or_else(|| wanted.parse().ok())
}

/// The groups that have this user among their members.
fn groups_of(user: &str, group: &str) -> impl Iterator<Item = Gid> {
    group.lines().filter_map(move |line| {
        let fields: Vec<&str> = line.split(':').collect();
        let members = fields.get(3)?;
        let is_member = members.split(',').any(|member| member == user);
        let gid = fields.get(2)?.parse().ok()?;
        is_member.then(|| Gid::from_raw(gid))
    })
}

fn missing(what: &str, name: &str) -> Refusal {
    Refusal {
        why: Why::NotFound,
        words: format!("the guest has no {what} {name:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/srv:/bin/false\n";
    const GROUP: &str = "root:x:0:\nwww:x:34:\nlogs:x:40:web,root\n";

    fn look(wanted: &str) -> (u32, u32, Vec<u32>) {
        let User { identity, .. } = look_up(wanted, PASSWD, GROUP).unwrap();
        let groups = identity.groups.iter().map(|gid| gid.as_raw()).collect();
        (identity.uid.as_raw(), identity.gid.as_raw(), groups)
    }

    #[test]
    fn users_and_groups_are_known_by_name_and_number() {
        assert_eq!(look("web"), (33, 34, vec![34, 40]));
        assert_eq!(look("33"), (33, 34, vec![34, 40]));
        assert_eq!(look("web:logs"), (33, 40, vec![40]));
        assert_eq!(look("web:77"), (33, 77, vec![77]));
        assert_eq!(look("1000"), (1000, 1000, vec![1000]));
    }

    #[test]
    fn a_user_is_at_home_where_the_guest_says() {
        let home = |wanted| look_up(wanted, PASSWD, GROUP).unwrap().home;
        assert_eq!(
            ["root", "33:logs", "1000"].map(home),
            ["/root", "/srv", "/"]
        );
    }

    #[test]
    fn who_does_not_exist_is_told_by_name() {
        let said = |wanted| look_up(wanted, PASSWD, GROUP).unwrap_err().words;
        assert_eq!(said("bob"), r#"the guest has no user "bob""#);
        assert_eq!(said("web:staff"), r#"the guest has no group "staff""#);
        assert_eq!(said(""), r#"the guest has no user """#);
        assert_eq!(said("-1"), r#"the guest has no user "-1""#);
    }
}
