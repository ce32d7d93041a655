//! A host, an internet and guests, all in namespaces that end with the test.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rekindle_store::Root;
use rustix::event::{PollFd, PollFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::net::attachment::{Attachment, of_installation, undo};
use crate::net::links::{Links, Steps};
use crate::net::plan::{GuestLink, Nat, Pair};
use crate::net::policy::Policy;
use crate::net::sweep::{Mode, sweep};
use crate::net::{NetError, Place, check_rights, namespace, set, sys};
use crate::vm::dir::VmDir;

pub(super) const HOST: &str = "203.0.113.1";
pub(super) const INTERNET: &str = "203.0.113.2";
pub(super) const METADATA: &str = "169.254.169.254";

/// How long what is not let through is waited for.
const SILENCE: Duration = Duration::from_millis(300);
/// How long what must come is waited for.
const SOON: Duration = Duration::from_secs(20);

/// A namespace, held.
struct Net(File);

impl Net {
    fn new(prepare: impl FnOnce() + Send) -> Net {
        let made = namespace::enter(|_| {
            prepare();
            Ok(Net::here())
        });
        made.unwrap()
    }

    /// That of the calling thread.
    fn here() -> Net {
        Net(File::open("/proc/thread-self/ns/net").unwrap())
    }

    fn opens_tap(&self) -> File {
        let tap = GuestLink::nth(0).tap;
        self.within(|| sys::open_tap(&tap).unwrap())
    }

    fn within<T: Send>(&self, what: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network))
                    .unwrap();
                what()
            });
            inside
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn reaches(&self, there: SocketAddr) -> bool {
        self.connects(there, SOON)
    }

    fn misses(&self, there: SocketAddr) -> bool {
        !self.connects(there, SILENCE)
    }

    fn connects(&self, there: SocketAddr, within: Duration) -> bool {
        self.within(|| TcpStream::connect_timeout(&there, within).is_ok())
    }

    fn reaches_by_udp(&self, there: SocketAddr) -> bool {
        self.within(|| {
            let any = if there.is_ipv4() {
                "0.0.0.0:0"
            } else {
                "[::]:0"
            };
            let socket = UdpSocket::bind(any).unwrap();
            socket.set_read_timeout(Some(SILENCE)).unwrap();
            let deadline = Instant::now() + SOON;
            while Instant::now() < deadline {
                if socket.send_to(b"?", there).is_ok() && socket.recv(&mut [0; 8]).is_ok() {
                    return true;
                }
            }
            false
        })
    }

    fn listens(&self, host: &str, port: u16) -> Listening {
        Listening(self.within(|| TcpListener::bind((host, port)).unwrap()))
    }

    /// Answers one datagram.
    fn echoes(&self, host: &str, port: u16) -> SocketAddr {
        let socket = self.within(|| UdpSocket::bind((host, port)).unwrap());
        let address = socket.local_addr().unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        std::thread::spawn(move || {
            if let Ok((_, from)) = socket.recv_from(&mut [0; 8]) {
                let _ = socket.send_to(b"!", from);
            }
        });
        address
    }
}

/// A TCP port that is listened on. The kernel takes connections for it.
#[derive(Debug)]
pub(super) struct Listening(TcpListener);

impl Listening {
    pub(super) fn address(&self) -> SocketAddr {
        self.0.local_addr().unwrap()
    }
}

fn configure(links: &mut Links, link: &str, nets: &[&str]) {
    let index = links.index(link).unwrap();
    let steps = nets.iter().fold(Steps::default().up(index), |steps, net| {
        steps.address(index, net.parse().unwrap())
    });
    links.run(steps).unwrap();
}

pub(super) struct World {
    host: Net,
    internet: Net,
    root: Root,
    guests: AtomicUsize,
    _place: tempfile::TempDir,
}

impl World {
    /// Nothing without the rights for it, as then nobody has a network.
    pub(super) fn make() -> Option<World> {
        if check_rights().is_err() {
            assert!(NetError::Rights.to_string().contains("run as root"));
            return None;
        }
        let internet = Net::new(|| {});
        let host = Net::new(|| {
            set("ipv4/ip_forward", "1").unwrap();
            set("ipv6/conf/all/forwarding", "1").unwrap();
            let mut links = Links::open().unwrap();
            links
                .run(Steps::default().pair("wan", "wan", &internet.0))
                .unwrap();
            configure(&mut links, "lo", &[]);
            configure(&mut links, "wan", &["203.0.113.1/24", "2001:db8::1/64"]);
        });
        internet.within(|| {
            let mut links = Links::open().unwrap();
            // Without a loopback device of its own it can send down the cable what is for loopback, and take the answers.
            set("ipv4/conf/wan/route_localnet", "1").unwrap();
            configure(
                &mut links,
                "wan",
                &[
                    "203.0.113.2/24",
                    "203.0.113.77/24",
                    "2001:db8::2/64",
                    "169.254.169.254/32",
                ],
            );
            let wan = links.index("wan").unwrap();
            // What guests are reached by, if the host forwards it.
            links
                .run(Steps::default().default_route(wan, HOST.parse().unwrap()))
                .unwrap();
        });
        host.within(|| {
            let mut links = Links::open().unwrap();
            let wan = links.index("wan").unwrap();
            links
                .run(Steps::default().route(wan, METADATA.parse().unwrap()))
                .unwrap();
        });
        let place = tempfile::tempdir().unwrap();
        Some(World {
            host,
            internet,
            root: Root::open(place.path()).unwrap(),
            guests: AtomicUsize::new(0),
            _place: place,
        })
    }

    pub(super) fn internet_listens(&self, host: &str, port: u16) -> Listening {
        self.internet.listens(host, port)
    }

    pub(super) fn internet_echoes(&self, host: &str, port: u16) -> SocketAddr {
        self.internet.echoes(host, port)
    }

    pub(super) fn host_listens(&self, host: &str, port: u16) -> Listening {
        self.host.listens(host, port)
    }

    pub(super) fn host_reaches(&self, there: SocketAddr) -> bool {
        self.host.reaches(there)
    }

    pub(super) fn internet_reaches(&self, there: SocketAddr) -> bool {
        self.internet.reaches(there)
    }

    pub(super) fn internet_misses(&self, there: SocketAddr) -> bool {
        self.internet.misses(there)
    }

    pub(super) fn internet_reaches_by_udp(&self, there: SocketAddr) -> bool {
        self.internet.reaches_by_udp(there)
    }

    /// The links and tables of ours that the host has, and how often.
    pub(super) fn things(&self) -> Vec<String> {
        self.host.within(|| {
            let mut host = Links::open().unwrap().names().unwrap();
            host.extend(crate::net::nft::Nftables::open().unwrap().tables().unwrap());
            host.sort();
            host
        })
    }

    pub(super) fn sweeps(&self) -> Vec<String> {
        self.host.within(|| {
            let found = sweep(&self.root, Mode::Report).unwrap();
            assert_eq!(sweep(&self.root, Mode::Reclaim).unwrap(), found);
            assert_eq!(
                of_installation(self.root.installation()).unwrap(),
                Vec::<String>::new()
            );
            found
        })
    }

    pub(super) fn guest(&self, name: &str, policy: Policy) -> Guest<'_> {
        self.try_guest(name, policy).unwrap()
    }

    pub(super) fn try_guest(&self, name: &str, policy: Policy) -> Result<Guest<'_>, NetError> {
        self.try_guest_with(name, Nat::new(policy))
    }

    pub(super) fn try_guest_with(&self, name: &str, nat: Nat) -> Result<Guest<'_>, NetError> {
        let number = self.guests.fetch_add(1, Ordering::Relaxed);
        let dir = VmDir::create(&self.root, &name.parse().unwrap()).unwrap();
        let installation = self.root.installation();
        let link = GuestLink::nth(0);
        let range = nat.range;
        let made = self.host.within(|| {
            let attachment =
                Attachment::announce(&dir, installation, &format!("{number:08x}"), nat, 1)?;
            let tap = Place::Attached(&attachment).run(Net::here)?.opens_tap();
            attachment.connected()?;
            let index = Links::open().unwrap().index(attachment.name()).unwrap();
            Ok::<_, NetError>((attachment, tap, Pair::of(range, index)))
        });
        let (attachment, tap, pair) = match made {
            Ok(made) => made,
            Err(e) => {
                self.host.within(|| undo(&dir)).unwrap();
                std::fs::remove_dir_all(dir.path()).unwrap();
                return Err(e);
            }
        };
        let mut end = None;
        let net = Net::new(|| {
            end = Some(sys::open_tap("eth0").unwrap());
            let mut links = Links::open().unwrap();
            let nets = link.guest.map(|net| net.to_string());
            configure(&mut links, "eth0", &nets.each_ref().map(String::as_str));
            let eth0 = links.index("eth0").unwrap();
            let steps = link.gateway.iter().fold(Steps::default(), |steps, way| {
                steps.default_route(eth0, *way)
            });
            links.run(steps).unwrap();
        });
        Ok(Guest {
            world: self,
            net: Arc::new(net),
            cable: Some(Cable::between(tap, end.unwrap())),
            attachment: Some(attachment),
            dir,
            pair,
        })
    }
}

/// A namespace at the other end of a VM's TAP device, as the guest would be.
pub(super) struct Guest<'a> {
    world: &'a World,
    net: Arc<Net>,
    cable: Option<Cable>,
    attachment: Option<Attachment>,
    dir: VmDir,
    pair: Pair,
}

impl Guest<'_> {
    pub(super) fn address(&self) -> IpAddr {
        self.pair.vm[0]
    }

    pub(super) fn address_v6(&self) -> IpAddr {
        self.pair.vm[1]
    }

    /// The host's end of the guest's pair of links.
    pub(super) fn pair_host(&self) -> IpAddr {
        self.pair.host[0]
    }

    pub(super) fn reaches(&self, there: SocketAddr) -> bool {
        self.net.reaches(there)
    }

    pub(super) fn misses(&self, there: SocketAddr) -> bool {
        self.net.misses(there)
    }

    pub(super) fn reaches_by_udp(&self, there: SocketAddr) -> bool {
        self.net.reaches_by_udp(there)
    }

    pub(super) fn listens(&self, port: u16) -> Listening {
        self.net.listens("::", port)
    }

    pub(super) fn echoes(&self, port: u16) {
        self.net.echoes("0.0.0.0", port);
    }

    /// Adds an address that nobody gave it.
    pub(super) fn takes(&self, net: &str) {
        self.net
            .within(|| configure(&mut Links::open().unwrap(), "eth0", &[net]));
    }

    pub(super) fn reaches_from(&self, from: IpAddr, there: SocketAddr) -> bool {
        self.net.within(|| {
            let socket = UdpSocket::bind((from, 0)).unwrap();
            socket.set_read_timeout(Some(SILENCE)).unwrap();
            let there = self.world.internet.echoes(&there.ip().to_string(), 5000);
            socket.send_to(b"?", there).unwrap();
            socket.recv(&mut [0; 8]).is_ok()
        })
    }

    /// What runs in its namespace dies, and its owner starts it anew. It runs as long as what is returned.
    pub(super) fn starts_anew(&mut self) -> File {
        self.cable = None;
        let attachment = self.attachment.as_ref().unwrap();
        self.world.host.within(|| {
            let started = Place::Attached(attachment).run(Net::here).unwrap();
            attachment.connected().unwrap();
            started.opens_tap()
        })
    }

    /// Its owner dies without a word.
    pub(super) fn forgotten(mut self) {
        self.dies();
        self.world.host.within(|| {
            undo(&self.dir).unwrap();
            undo(&self.dir).unwrap();
        });
    }

    /// Its owner dies without a word, and somebody removes its directory by hand.
    pub(super) fn forgotten_without_a_directory(mut self) {
        self.dies();
        std::fs::remove_dir_all(self.dir.path()).unwrap();
    }

    fn dies(&mut self) {
        if let Some(attachment) = &mut self.attachment {
            attachment.live_on();
        }
        self.attachment = None;
        self.cable = None;
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        self.cable = None;
        let attachment = self.attachment.take();
        self.world.host.within(|| drop(attachment));
    }
}

/// Carries what comes out of one TAP device into the other.
struct Cable {
    stop: OwnedFd,
    carrier: Option<JoinHandle<()>>,
}

impl Cable {
    fn between(one: File, other: File) -> Cable {
        let (stopped, stop) = rustix::pipe::pipe().unwrap();
        let carry = move || {
            let mut frame = vec![0; 1 << 16];
            loop {
                let mut ready = [
                    PollFd::new(&stopped, PollFlags::IN),
                    PollFd::new(&one, PollFlags::IN),
                    PollFd::new(&other, PollFlags::IN),
                ];
                rustix::event::poll(&mut ready, None).unwrap();
                let [stopping, from_one, from_other] = ready.map(|one| !one.revents().is_empty());
                if stopping {
                    return;
                }
                for (is_ready, mut from, mut to) in
                    [(from_one, &one, &other), (from_other, &other, &one)]
                {
                    if is_ready && let Ok(length) = from.read(&mut frame) {
                        let _ = to.write(&frame[..length]);
                    }
                }
            }
        };
        Cable {
            stop,
            carrier: Some(std::thread::spawn(carry)),
        }
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, b"!");
        if let Some(carrier) = self.carrier.take() {
            let _ = carrier.join();
        }
    }
}
