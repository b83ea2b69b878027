#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;

fn address(text: &str) -> Address {
    text.parse().unwrap()
}

#[test]
fn addresses_have_a_host_a_port_and_no_other_scheme_than_https() {
    for (text, shown) in [
        ("https://istiod.istio-system.svc:15012", "istiod.istio-system.svc:15012"),
        ("istiod.istio-system.svc:15012", "istiod.istio-system.svc:15012"),
        ("https://example.com", "example.com:443"),
        ("127.0.0.1:15012", "127.0.0.1:15012"),
        ("https://[::1]:15012", "[::1]:15012"),
    ] {
        assert_eq!(address(text).to_string(), shown);
    }
    for (text, problem) in
        [("http://istiod:15010", "plaintext"), ("", "form"), ("https://:15012", "form"), ("https://a b:1", "form"), ("bad_host!:1", "form")]
    {
        let error = text.parse::<Address>().unwrap_err().to_string();
        assert!(error.contains(&format!("{text:?}")), "{error}");
        assert!(error.contains(problem) || error.contains("host"), "{error}");
    }
}

#[test]
fn roots_are_a_path_a_text_or_the_system() {
    assert_eq!(RootSource::of("SYSTEM"), RootSource::System);
    assert_eq!(RootSource::of("./var/root-cert.pem"), RootSource::File("./var/root-cert.pem".into()));
    assert!(matches!(RootSource::of("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"), RootSource::Text(_)));
}

#[test]
fn a_token_is_a_path_or_itself_and_never_shown() {
    assert_eq!(Token::of("/no/such/file"), Token::File("/no/such/file".into()));
    assert_eq!(Token::of("./var/run/token"), Token::File("./var/run/token".into()));
    let literal = Token::of("eyJhbGciOi");
    assert!(matches!(&literal, Token::Literal(text) if text.as_str() == "eyJhbGciOi"));
    assert!(!format!("{literal:?}").contains("eyJ"));
}

#[tokio::test]
async fn the_token_file_is_read_for_every_call_and_must_hold_a_token() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let token = Some(Token::of(file.path().to_str().unwrap()));
    let config = Config { token, ..Config::new(address("localhost:1"), RootSource::System) };
    let dialer = Dialer::new(config).unwrap();
    for text in ["one", "two\n"] {
        std::fs::write(file.path(), text).unwrap();
        let headers = dialer.metadata().await.unwrap();
        let value = headers.get("authorization").unwrap();
        assert_eq!(value.to_str().unwrap(), format!("Bearer {}", text.trim()));
        assert!(!format!("{headers:?}").contains(text.trim()), "a token must not be printed");
    }
    for (text, problem) in [("", "empty"), (" \n", "empty"), ("a\nb", "not a token")] {
        std::fs::write(file.path(), text).unwrap();
        let error = dialer.metadata().await.unwrap_err().to_string();
        assert!(error.contains(problem) && error.contains(file.path().to_str().unwrap()), "{error}");
    }
    std::fs::remove_file(file.path()).unwrap();
    assert!(dialer.metadata().await.unwrap_err().to_string().contains("no such file"));
}

#[tokio::test]
async fn configured_headers_go_with_every_call_and_bad_ones_stop_the_start() {
    let with = |name: &str, value: &str| {
        Dialer::new(Config { headers: vec![(name.into(), value.into())], ..Config::new(address("localhost:1"), RootSource::System) })
    };
    let headers = with("ClusterID", "Kubernetes").unwrap().metadata().await.unwrap();
    assert_eq!(headers.get("clusterid").unwrap(), "Kubernetes");
    assert!(headers.get("authorization").is_none(), "no token, no header");
    for (name, value) in [("two words", "x"), ("", "x"), ("x", "line\nbreak")] {
        assert!(matches!(with(name, value), Err(Error::Setting { .. })), "{name:?} {value:?}");
    }
}

#[tokio::test]
async fn roots_that_cannot_be_read_are_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let dialer = Dialer::new(Config::new(address("localhost:1"), RootSource::File(file.path().into()))).unwrap();
    for (text, problem) in [("", "no usable"), ("hello", "no usable"), ("-----BEGIN CERTIFICATE-----\nAAAA\n", "not PEM")] {
        std::fs::write(file.path(), text).unwrap();
        let error = dialer.roots().await.unwrap_err().to_string();
        assert!(error.contains(problem) && error.contains(file.path().to_str().unwrap()), "{error}");
    }
    std::fs::write(file.path(), vec![b'x'; (4 << 20) + 1]).unwrap();
    assert!(dialer.roots().await.unwrap_err().to_string().contains("more than the"));
    std::fs::remove_file(file.path()).unwrap();
    assert!(dialer.roots().await.unwrap_err().to_string().contains("no such file"));
}

#[test]
fn a_status_of_the_server_is_shown_without_what_could_forge_a_log_line() {
    let status = tonic::Status::permission_denied(format!("no\nfake line\x1b[0m {}", "x".repeat(5000)));
    let text = status_text(&status);
    assert!(text.len() < 500 && text.chars().all(|letter| !letter.is_control()), "{text}");
    assert!(text.starts_with("no fake line"), "{text}");
    assert!(status_text(&tonic::Status::new(tonic::Code::Unavailable, "")).contains("unavailable"));
}
