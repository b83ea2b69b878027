//! Small programs to run in pods, so that a demonstration needs nothing but this binary: an HTTP server and client, and an echo server
//! and client for raw TCP. They know nothing of the mesh and are as plain as their purpose.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

/// A request's or a line's end, wherever it comes from, is within this.
const LONGEST: u64 = 64 * 1024;
const TIMEOUT: Duration = Duration::from_secs(10);

/// Serves HTTP/1.1 on a port of every address: each answer says who answered, who asked, and repeats the request line and headers.
///
/// # Errors
/// When the port cannot be listened on.
pub fn serve_http(port: u16, name: &str) -> io::Result<()> {
    let name = name.to_owned();
    serve(port, move |stream| {
        let peer = stream.peer_addr()?;
        let mut head = String::new();
        let mut reader = BufReader::new(Read::take(&stream, LONGEST));
        while reader.read_line(&mut head)? > 0 && !head.ends_with("\r\n\r\n") {}
        let body = format!("{name} answers {}\n{head}", peer.ip().to_canonical());
        let length = body.len();
        write!(&stream, "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}")
    })
}

/// Gives back every byte it gets, on a port of every address; `greeting`, if any, goes first.
///
/// # Errors
/// When the port cannot be listened on.
pub fn serve_echo(port: u16, greeting: Option<String>) -> io::Result<()> {
    serve(port, move |stream| {
        if let Some(greeting) = &greeting {
            writeln!(&stream, "{greeting}")?;
        }
        io::copy(&mut &stream, &mut &stream)?;
        stream.shutdown(Shutdown::Write)
    })
}

fn serve(port: u16, answer: impl Fn(TcpStream) -> io::Result<()> + Clone + Send + 'static) -> io::Result<()> {
    let listener = TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)))?;
    for stream in listener.incoming() {
        let (stream, answer) = (stream?, answer.clone());
        // A client that goes away in the middle is not the server's problem.
        thread::spawn(move || answer(stream).ok());
    }
    Ok(())
}

/// Gets an `http://` address, prints the answer's body, and says whether its status was 200; another one goes to standard error. `header` is
/// `name: value`.
///
/// # Errors
/// When the address is not understood, or the connection fails.
pub fn get(url: &str, header: Option<&str>) -> io::Result<bool> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidInput, format!("{url:?} is not http://HOST[:PORT][/PATH]"));
    let rest = url.strip_prefix("http://").ok_or_else(invalid)?;
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let has_port = authority.rsplit_once(':').is_some_and(|(host, port)| port.parse::<u16>().is_ok() && (!host.contains(':') || host.ends_with(']')));
    let mut stream = connect(&if has_port { authority.to_owned() } else { format!("{authority}:80") })?;
    let header = header.map(|header| format!("{header}\r\n")).unwrap_or_default();
    let mut text = String::new();
    let request = format!("GET /{path} HTTP/1.1\r\nhost: {authority}\r\n{header}connection: close\r\n\r\n");
    let exchange = stream.write_all(request.as_bytes()).and_then(|()| stream.take(LONGEST).read_to_string(&mut text));
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(|| match exchange {
        Ok(_) => io::Error::new(io::ErrorKind::UnexpectedEof, "connected, then closed without an answer"),
        Err(error) => io::Error::new(error.kind(), format!("connected, then closed without an answer ({error})")),
    })?;
    io::stdout().write_all(body.as_bytes())?;
    let status = head.split(' ').nth(1);
    if status != Some("200") {
        writeln!(io::stderr(), "status {}", status.unwrap_or("unknown"))?;
    }
    Ok(status == Some("200"))
}

/// Sends one line and prints the line that comes back; with `hold`, then keeps the connection open and says when the other side
/// ended it.
///
/// # Errors
/// When the connection fails, or ends before the line came back.
pub fn talk(address: &str, text: &str, hold: bool) -> io::Result<()> {
    let mut stream = connect(address)?;
    writeln!(stream, "{text}")?;
    let mut line = String::new();
    let mut reader = BufReader::new(stream.try_clone()?.take(LONGEST));
    if reader.read_line(&mut line)? == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection ended without an answer"));
    }
    io::stdout().write_all(line.as_bytes())?;
    if hold {
        stream.set_read_timeout(None)?;
        let since = Instant::now();
        let how = match reader.read_line(&mut line) {
            Ok(_) => "closed".to_owned(),
            Err(error) => format!("cut ({error})"),
        };
        writeln!(io::stdout(), "{how} after {} ms", since.elapsed().as_millis())?;
    }
    Ok(())
}

fn connect(address: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, format!("{address:?} has no address"));
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, TIMEOUT) {
            Ok(stream) => {
                stream.set_read_timeout(Some(TIMEOUT))?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}
