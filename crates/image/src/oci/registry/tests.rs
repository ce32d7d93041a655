use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use super::*;

/// Address and authorization of a request.
type Request = (String, Option<String>);
/// Status, header and body of an answer.
type Answer = (u16, String, Vec<u8>);

/// A registry that answers what the test wants, and tells what it was asked. Its thread ends with the test's process.
fn registry(
    answer: impl Fn(&str, Option<&str>, &str) -> Answer + Send + 'static,
) -> (String, Receiver<Request>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let (asked, requests) = channel();
    let own = host.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let (path, authorization) = request(&stream);
            let (status, header, body) = answer(&path, authorization.as_deref(), &own);
            let _ = asked.send((path, authorization));
            let size = body.len();
            let head = format!(
                "HTTP/1.1 {status} -\r\n{header}content-length: {size}\r\nconnection: close\r\n\r\n"
            );
            let _ = stream.write_all(&[head.as_bytes(), &body].concat());
        }
    });
    (host, requests)
}

fn request(stream: &TcpStream) -> Request {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let first = lines.next().unwrap_or_default();
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut authorization = None;
    for line in lines.take_while(|line| !line.is_empty()) {
        if let Some((name, value)) = line.split_once(": ")
            && name.eq_ignore_ascii_case("authorization")
        {
            authorization = Some(value.to_owned());
        }
    }
    (path, authorization)
}

fn pull(host: &str, what: &str, credentials: Option<&str>) -> Result<(), RegistryError> {
    let layout = tempfile::tempdir().unwrap();
    let pull = Pull {
        reference: format!("{host}/{what}").parse().unwrap(),
        credentials: credentials.map(Credentials::of),
        limits: Limits {
            bytes: 1000,
            entries: 10,
        },
    };
    let pulled = pull.run(layout.path(), &mut |_| {});
    assert_eq!(pulled.is_ok(), layout.path().join("index.json").exists());
    pulled
}

/// An image of one layer of so many bytes, by address.
fn image(layer: &[u8], said: usize) -> Vec<(String, Vec<u8>)> {
    let digest = |bytes: &[u8]| Sha256::of(bytes).to_string();
    let config = json!({"rootfs": {"diff_ids": [digest(layer)]}}).to_string();
    let manifest = json!({
        "config": {"digest": digest(config.as_bytes()), "size": config.len()},
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": digest(layer), "size": said,
        }],
    });
    vec![
        (
            "/v2/web/manifests/1".to_owned(),
            manifest.to_string().into(),
        ),
        (
            format!("/v2/web/blobs/{}", digest(config.as_bytes())),
            config.into(),
        ),
        (format!("/v2/web/blobs/{}", digest(layer)), layer.to_vec()),
    ]
}

fn of(parts: &[(String, Vec<u8>)], path: &str) -> Answer {
    match parts.iter().find(|(address, _)| address == path) {
        Some((_, bytes)) => (200, String::new(), bytes.clone()),
        None => (404, String::new(), Vec::new()),
    }
}

#[test]
fn a_registry_that_sends_for_a_token_gets_it_and_the_password_goes_only_there() {
    let parts = Arc::new(image(b"layer", 5));
    let (host, requests) = registry(move |path, authorization, own| {
        if path.starts_with("/token?") {
            return (200, String::new(), br#"{"token": "t0k"}"#.to_vec());
        }
        if authorization != Some("Bearer t0k") {
            let header =
                format!("www-authenticate: Bearer realm=\"http://{own}/token\",service=\"me\"\r\n");
            return (401, header, Vec::new());
        }
        of(&parts, path)
    });
    pull(&host, "web:1", Some("bWU6c3dvcmRmaXNo")).unwrap();
    let requests: Vec<_> = requests.try_iter().collect();
    let with_password: Vec<_> = requests
        .iter()
        .filter(|(_, authorization)| {
            authorization
                .as_ref()
                .is_some_and(|it| it.starts_with("Basic"))
        })
        .map(|(path, _)| path.as_str())
        .collect();
    assert_eq!(
        with_password,
        ["/token?scope=repository%3Aweb%3Apull&service=me"]
    );
    assert_eq!(requests.len(), 5, "{requests:?}");
}

#[test]
fn a_password_is_not_sent_where_others_could_read_it() {
    let (host, requests) = registry(|_, _, _| {
        let header = "www-authenticate: Bearer realm=\"http://192.0.2.1/token\"\r\n";
        (401, header.to_owned(), Vec::new())
    });
    let error = pull(&host, "web:1", Some("bWU6c3dvcmRmaXNo")).unwrap_err();
    assert!(matches!(error, RegistryError::Challenge { .. }), "{error}");
    assert_eq!(requests.try_iter().count(), 1);
}

#[test]
fn what_is_too_much_is_refused_before_it_is_read() {
    let (host, requests) = registry({
        let parts = image(b"layer", 1001);
        move |path, _, _| of(&parts, path)
    });
    let error = pull(&host, "web:1", None).unwrap_err();
    assert!(
        matches!(error, RegistryError::TooLarge { limit: 1000 }),
        "{error}"
    );
    assert_eq!(requests.try_iter().count(), 2, "no layer was asked for");
    let (host, _requests) = registry(|_, _, _| (200, String::new(), vec![b' '; 5 << 20]));
    let error = pull(&host, "web:1", None).unwrap_err();
    assert!(
        matches!(error, RegistryError::Oci(OciError::TooLarge { .. })),
        "{error}"
    );
    let (host, _requests) = registry({
        let parts = image(b"layer and more", 5);
        move |path, _, _| of(&parts, path)
    });
    let error = pull(&host, "web:1", None).unwrap_err();
    assert!(
        matches!(
            error,
            RegistryError::Oci(OciError::Size {
                expected: 5,
                found: 6,
                ..
            })
        ),
        "{error}"
    );
}

#[test]
fn whoever_does_not_answer_is_named() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = nobody.local_addr().unwrap().to_string();
    drop(nobody);
    let error = pull(&host, "web:1", None).unwrap_err().to_string();
    assert_eq!(error, format!("cannot ask the registry {host}"));
    let (host, _requests) = registry(|_, _, _| (503, String::new(), Vec::new()));
    let error = pull(&host, "web:1", None).unwrap_err().to_string();
    assert!(error.contains("answers 503"), "{error}");
}
