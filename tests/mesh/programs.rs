//! Real programs through the mesh: what people run, unchanged and unaware (nginx, curl, redis, iperf3), and the traffic that breaks
//! proxies: much data both ways at once, a server that speaks first, thousands of short connections.
//!
//! Pods whose programs need files get an empty `/tmp` in memory, so that nothing of theirs is left on the machine.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::Instant;

use culvert::lab::Place;
use culvert::sys::netns::NetNs;
use serde_json::Value;

use crate::bulk::{GIBIBYTE, gibibyte_each_way};
use crate::mesh::{Mesh, PATIENCE, alone, echo_on, installed, report, serve_echo, wait_until};

const NGINX: &str = r#"
nodes: [left, right]
pods:
  - {name: client, serviceAccount: client, node: left}
  - {name: outside, node: left, captured: false}
  - name: web
    serviceAccount: web
    node: right
    labels: {app: web}
    tmpfs: true
    waitFor: [8080]
    command: |
      cat > /tmp/nginx.conf <<'END'
      daemon off;
      master_process off;
      pid /tmp/nginx.pid;
      error_log stderr;
      events { worker_connections 512; }
      http {
        access_log off;
        client_body_temp_path /tmp/body;
        proxy_temp_path /tmp/proxy;
        fastcgi_temp_path /tmp/fastcgi;
        uwsgi_temp_path /tmp/uwsgi;
        scgi_temp_path /tmp/scgi;
        server {
          listen [::]:8080 ipv6only=off;
          default_type text/plain;
          location / { return 200 "$http_host $request_uri\n"; }
          location /files/ { alias /tmp/files/; }
        }
      }
      END
      mkdir /tmp/files
      head -c 8388608 /dev/urandom > /tmp/files/big
      sha256sum < /tmp/files/big > /tmp/files/sum
      exec nginx -p /tmp/ -e stderr -c /tmp/nginx.conf
services:
  - {name: web, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
"#;

#[test]
fn nginx_serves_curl_on_kept_new_and_parallel_connections_and_by_service_name() {
    if !installed("nginx", "nginx-light") || !installed("curl", "curl") {
        return;
    }
    let mesh = Mesh::up(NGINX);
    let curl = |pod: &str, arguments: &[&str]| {
        let all = [&["curl", "--silent", "--show-error", "--fail", "--max-time", "20"], arguments].concat();
        mesh.exec_ok(pod, &all)
    };
    // By the service's name and by each of its addresses; from outside of the mesh straight to the pod.
    assert_eq!(curl("client", &["http://web/hello"]), "web /hello\n");
    for vip in mesh.vips("web") {
        let authority = SocketAddr::from((vip, 0)).to_string().replace(":0", "");
        assert_eq!(curl("client", &["--globoff", &format!("http://{authority}/vip")]), format!("{authority} /vip\n"));
    }
    let direct = SocketAddr::from((mesh.ip("web"), 8080));
    assert_eq!(curl("outside", &[&format!("http://{direct}/outside")]), format!("{direct} /outside\n"));
    // A hundred requests one after the other: on one connection, then each on its own.
    let expected = |path: &str| (1..=100).map(|number| format!("web {path}{number}\n")).collect::<String>();
    let opened = || mesh.metric("left", "istio_tcp_connections_opened_total", &["reporter=\"source\"", "destination_service_name=\"web\""]);
    let before = opened();
    assert_eq!(curl("client", &["http://web/kept/[1-100]"]), expected("/kept/"));
    assert_eq!(opened() - before, 1.0);
    assert_eq!(curl("client", &["--header", "connection: close", "http://web/new/[1-100]"]), expected("/new/"));
    assert_eq!(opened() - before, 101.0);
    // Fifty at a time; the answers come in any order.
    let parallel = ["--parallel", "--parallel-immediate", "--parallel-max", "50", "--header", "connection: close", "http://web/many/[1-150]"];
    let answers = curl("client", &parallel);
    let mut numbers: Vec<u32> = answers.lines().map(|line| line.strip_prefix("web /many/").unwrap().parse().unwrap()).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (1..=150).collect::<Vec<_>>());
    // A file of 8 MiB arrives as it was.
    let sum = mesh.exec_ok("client", &["sh", "-c", "curl --silent --fail http://web/files/big | sha256sum"]);
    assert_eq!(sum, curl("client", &["http://web/files/sum"]));
}

#[test]
fn fifty_clients_of_redis_get_no_error() {
    if !installed("redis-server", "redis-server") || !installed("redis-benchmark", "redis-tools") {
        return;
    }
    let _alone = alone();
    let mesh = Mesh::up(
        r#"
nodes: [left, right]
pods:
  - {name: client, serviceAccount: client, node: left}
  - name: redis
    serviceAccount: redis
    node: right
    labels: {app: redis}
    tmpfs: true
    waitFor: [6379]
    command: [redis-server, --port, "6379", --bind, "*", "-::*", --protected-mode, "no", --save, "", --appendonly, "no", --dir, /tmp]
services:
  - {name: redis, selector: {app: redis}, ports: [{port: 6379}]}
"#,
    );
    let benchmark = |arguments: &[&str]| {
        let all = [&["redis-benchmark", "-h", "redis", "-c", "50", "--csv"], arguments].concat();
        let output = mesh.exec("client", &all);
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && !text.to_lowercase().contains("err"), "{arguments:?}: {}\n{text}", output.status);
        // "test","rps",...: the first line is the head.
        let rates = text.lines().skip(1).map(|line| line.split(',').map(|word| word.trim_matches('"')).take(2).collect::<Vec<_>>().join(" "));
        let rates: Vec<String> = rates.collect();
        assert!(!rates.is_empty(), "{text}");
        rates.join(", ")
    };
    report(&format!("requests a second, 50 clients: {}", benchmark(&["-n", "10000", "-t", "set,get,incr,lrange_100"])));
    report(&format!("16 at once on each connection: {}", benchmark(&["-n", "50000", "-P", "16", "-t", "set,get"])));
    report(&format!("values of 64 KiB: {}", benchmark(&["-n", "1000", "-d", "65536", "-t", "set,get"])));
    let count = mesh.exec_ok("client", &["redis-cli", "-h", "redis", "get", "counter:__rand_int__"]);
    assert_eq!(count.trim(), "10000", "not every INCR arrived exactly once");
}

#[test]
fn iperf3_moves_data_in_both_directions_and_on_parallel_streams() {
    if !installed("iperf3", "iperf3") {
        return;
    }
    let _alone = alone();
    // A server takes one test at a time: one for each. Not tested is `--bidir`: it tells its two connections apart by the order in which
    // they arrive, which no proxy keeps.
    let mesh = Mesh::up(
        r#"
nodes: [left, right]
pods:
  - {name: client, serviceAccount: client, node: left}
  - name: server
    serviceAccount: server
    node: right
    waitFor: [5201, 5202, 5203]
    command: "for port in 5201 5202 5203; do iperf3 --server --port $port & done; wait"
"#,
    );
    let server = mesh.ip("server").to_string();
    let runs: [(&str, &[&str]); 3] = [("to the server", &[]), ("from the server", &["--reverse"]), ("four streams", &["--parallel", "4"])];
    for (port, (name, arguments)) in (5201..).zip(runs) {
        let port = u16::to_string(&port);
        let all = [&["iperf3", "--json", "--time", "1", "--client", &server, "--port", &port], arguments].concat();
        let output = mesh.exec("client", &all);
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(output.status.success() && answer["error"].is_null(), "{name}: {answer}");
        let [sent, received] = ["sum_sent", "sum_received"].map(|end| answer["end"][end]["bytes"].as_u64().unwrap());
        assert!(received > 0 && received <= sent, "{name}: {received} of {sent} bytes arrived");
        report(&format!("{name}: {:.0} MB/s", answer["end"]["sum_received"]["bits_per_second"].as_f64().unwrap() / 8e6));
    }
}

const TWO_PODS: &str = r#"
nodes: [left, right]
pods:
  - {name: client, serviceAccount: client, node: left}
  - {name: server, serviceAccount: server, node: right}
"#;

#[test]
fn a_gibibyte_each_way_at_the_same_time_arrives_intact() {
    let _alone = alone();
    let mesh = Mesh::up(TWO_PODS);
    let listener = mesh.listen("server", 9000);
    let client = mesh.connect("client", (mesh.ip("server"), 9000)).unwrap();
    let (server, _) = listener.accept().unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    server.set_write_timeout(Some(PATIENCE)).unwrap();
    let took = gibibyte_each_way(&client, &server);
    report(&format!("2 x 1 GiB in {took:.1?}, {:.0} MB/s both ways together", 2.0 * GIBIBYTE as f64 / 1e6 / took.as_secs_f64()));
    drop((client, server));
    for (node, reporter) in [("left", "reporter=\"source\""), ("right", "reporter=\"destination\"")] {
        wait_until("it is closed", || mesh.metric(node, "istio_tcp_connections_closed_total", &[reporter, "response_flags=\"-\""]) == 1.0);
        for metric in ["istio_tcp_received_bytes_total", "istio_tcp_sent_bytes_total"] {
            assert_eq!(mesh.metric(node, metric, &[reporter]), GIBIBYTE as f64, "{node} {metric}");
        }
    }
}

/// Serves one SMTP client to its end, as a real server does: it greets first, and closes after QUIT. Returns the message.
fn serve_smtp(socket: TcpStream) -> io::Result<String> {
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut lines = BufReader::new(socket.try_clone()?).lines();
    let mut out = socket;
    let mut message = String::new();
    out.write_all(b"220 mail.example ESMTP ready\r\n")?;
    while let Some(line) = lines.next().transpose()? {
        let verb = line.split([' ', ':']).next().unwrap_or_default().to_uppercase();
        match verb.as_str() {
            "EHLO" => out.write_all(b"250-mail.example\r\n250-8BITMIME\r\n250 SIZE 1048576\r\n")?,
            "DATA" => {
                out.write_all(b"354 go on\r\n")?;
                for line in lines.by_ref() {
                    match line? {
                        line if line == "." => break,
                        line => message.push_str(&(line + "\n")),
                    }
                }
                out.write_all(b"250 queued\r\n")?;
            }
            "QUIT" => {
                out.write_all(b"221 bye\r\n")?;
                return Ok(message);
            }
            _ => out.write_all(b"250 ok\r\n")?,
        }
    }
    Err(io::Error::other("the client left without QUIT"))
}

#[test]
fn a_mail_server_that_speaks_first_is_heard_on_every_route() {
    if !installed("curl", "curl") {
        return;
    }
    let mesh = Mesh::up(
        r#"
nodes: [left, right]
pods:
  - {name: client, serviceAccount: client, node: left}
  - {name: outside, node: left, captured: false}
  - {name: mail, serviceAccount: mail, node: right, labels: {app: mail}}
  - {name: plain, node: right, captured: false}
services:
  - {name: mail, selector: {app: mail}, ports: [{port: 25, targetPort: 2525}]}
"#,
    );
    std::fs::write(mesh.directory().join("message"), "Subject: hello\r\n\r\nThrough the mesh.\r\n").unwrap();
    let file = mesh.directory().join("message").display().to_string();
    let direct = |pod: &str| SocketAddr::from((mesh.ip(pod), 2525)).to_string();
    let routes = [("client", "mail", "mail:25".to_owned()), ("client", "plain", direct("plain")), ("outside", "mail", direct("mail"))];
    for (from, server, target) in routes {
        let listener = mesh.listen(server, 2525);
        let served = thread::spawn(move || serve_smtp(listener.accept().unwrap().0));
        let url = format!("smtp://{target}/client.example");
        let mut arguments = vec!["curl", "--silent", "--show-error", "--max-time", "10", "--url", &url, "--upload-file", &file];
        arguments.extend(["--mail-from", "a@client.example", "--mail-rcpt", "b@mail.example"]);
        mesh.exec_ok(from, &arguments);
        assert_eq!(served.join().unwrap().unwrap(), "Subject: hello\n\nThrough the mesh.\n", "{from} to {target}");
    }
}

#[test]
fn a_burst_of_connections_from_one_pod_is_served_to_the_last() {
    const COUNT: usize = 400;
    let _alone = alone();
    let mesh = Mesh::up(TWO_PODS);
    serve_echo(mesh.listen("server", 8080));
    let target = SocketAddr::from((mesh.ip("server"), 8080));
    // All are connected before the first of them says anything: many more than may be dialled at once.
    let connect = |_| TcpStream::connect_timeout(&target, PATIENCE).unwrap();
    let sockets: Vec<TcpStream> = mesh.run_in(Place::Pod("client"), || (0..COUNT).map(connect).collect());
    for (number, mut socket) in sockets.into_iter().enumerate() {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        echo_on(&mut socket, b"in the crowd").unwrap_or_else(|error| panic!("number {number}: {error}"));
    }
}

#[test]
fn two_thousand_short_connections_none_of_which_fails() {
    const EACH: usize = 500;
    let _alone = alone();
    let mesh = Mesh::up(TWO_PODS);
    serve_echo(mesh.listen("server", 8080));
    let (place, target): (NetNs, _) = (mesh.netns(Place::Pod("client")), SocketAddr::from((mesh.ip("server"), 8080)));
    let short = || -> io::Result<()> {
        let mut socket = TcpStream::connect_timeout(&target, PATIENCE)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        echo_on(&mut socket, b"short")?;
        socket.shutdown(Shutdown::Write)?;
        if socket.read(&mut [0])? == 0 { Ok(()) } else { Err(io::Error::other("more than was asked for")) }
    };
    let since = Instant::now();
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| place.run(|| (0..EACH).for_each(|number| short().unwrap_or_else(|error| panic!("number {number}: {error}")))).unwrap());
        }
    });
    report(&format!("{:.0} connections a second", 4.0 * EACH as f64 / since.elapsed().as_secs_f64()));
    for (node, reporter) in [("left", "reporter=\"source\""), ("right", "reporter=\"destination\"")] {
        let ended = [reporter, "response_flags=\"-\""];
        wait_until("all are closed", || mesh.metric(node, "istio_tcp_connections_closed_total", &ended) == 4.0 * EACH as f64);
        assert_eq!(mesh.metric(node, "istio_tcp_connections_opened_total", &[reporter]), 4.0 * EACH as f64);
        assert_eq!(mesh.metric(node, "istio_tcp_connections_failed_total", &[reporter]), 0.0);
    }
}
