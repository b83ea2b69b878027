//! A lab for tests: real namespaces, real proxies of this build, real rules. It ends with the test, whatever becomes of it.
#![allow(dead_code, unreachable_pub)]

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Output;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use culvert::lab::{Base, Lab, Launch, Place, Status, Wiring};
use culvert::sys::netns::NetNs;

/// How long anything that must happen may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A running lab.
pub struct Mesh {
    lab: Lab,
    status: Status,
    directory: tempfile::TempDir,
}

impl Mesh {
    /// Starts the lab that the text describes; its proxies read files.
    pub fn up(definition: &str) -> Self {
        Self::wired(definition, Wiring::Files)
    }

    /// The same with a control plane, from which the proxies learn everything.
    pub fn with_control_plane(definition: &str) -> Self {
        Self::wired(definition, Wiring::Control)
    }

    fn wired(definition: &str, wiring: Wiring) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let directory = tempfile::Builder::new().prefix("cv").tempdir_in("/tmp").unwrap();
        let lab = Lab::start(Launch {
            program: PathBuf::from(env!("CARGO_BIN_EXE_culvert")),
            base: Base::new(directory.path().to_path_buf()),
            name: format!("t{}", NEXT.fetch_add(1, Ordering::Relaxed)),
            definition: definition.to_owned(),
            leashed: true,
            wiring,
        });
        let lab = lab.unwrap_or_else(|error| panic!("the lab does not start: {error}"));
        let status = lab.status().unwrap();
        Self { lab, status, directory }
    }

    /// Where the test may put files.
    pub fn directory(&self) -> &std::path::Path {
        self.directory.path()
    }

    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    pub fn status(&self) -> Status {
        self.lab.status().unwrap()
    }

    /// Makes the lab become what the text says.
    pub fn apply(&self, definition: &str) {
        self.lab.apply(definition).unwrap_or_else(|error| panic!("the lab does not take it: {error}"));
    }

    /// A pod's IPv4 address.
    pub fn ip(&self, pod: &str) -> IpAddr {
        self.status.pod(pod).unwrap().addresses.iter().copied().find(IpAddr::is_ipv4).unwrap()
    }

    /// A pod's IPv6 address.
    pub fn ip6(&self, pod: &str) -> IpAddr {
        self.status.pod(pod).unwrap().addresses.iter().copied().find(IpAddr::is_ipv6).unwrap()
    }

    /// A service's virtual addresses, by the first label of its host name.
    pub fn vips(&self, service: &str) -> Vec<IpAddr> {
        let named = |hostname: &str| hostname.split('.').next() == Some(service);
        self.status.services.iter().find(|found| named(&found.hostname)).unwrap().addresses.clone()
    }

    /// A service's IPv4 address.
    pub fn vip(&self, service: &str) -> IpAddr {
        self.vips(service).into_iter().find(IpAddr::is_ipv4).unwrap()
    }

    pub fn netns(&self, place: Place<'_>) -> NetNs {
        self.lab.netns(place).unwrap()
    }

    /// Runs `work` on this thread as if it were in the place.
    pub fn run_in<T>(&self, place: Place<'_>, work: impl FnOnce() -> T) -> T {
        self.netns(place).run(work).unwrap()
    }

    /// A connection of a pod's application.
    pub fn connect(&self, pod: &str, target: impl Into<SocketAddr>) -> io::Result<TcpStream> {
        let target = target.into();
        let socket = self.run_in(Place::Pod(pod), || TcpStream::connect_timeout(&target, PATIENCE))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(socket)
    }

    /// A server in a pod, on a port of every address.
    pub fn listen(&self, pod: &str, port: u16) -> TcpListener {
        self.run_in(Place::Pod(pod), || TcpListener::bind(("::", port))).unwrap()
    }

    /// Sends a line and expects it back.
    pub fn echo(&self, pod: &str, target: impl Into<SocketAddr>) -> io::Result<()> {
        let mut socket = self.connect(pod, target)?;
        echo_on(&mut socket, b"hello through the mesh\n")
    }

    /// Runs a program in a pod.
    pub fn exec(&self, pod: &str, arguments: &[&str]) -> Output {
        self.lab.exec(pod, arguments).unwrap()
    }

    /// Runs a program in a pod that must succeed; returns what it printed.
    pub fn exec_ok(&self, pod: &str, arguments: &[&str]) -> String {
        let output = self.exec(pod, arguments);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "{arguments:?} in {pod}: {}\n{}{}", output.status, text(&output.stdout), text(&output.stderr));
        text(&output.stdout)
    }

    /// All lines that the proxy of a node (or a dedicated pod's) has logged.
    pub fn log(&self, of: &str) -> Vec<String> {
        let path = match self.status.node(of) {
            Ok(node) => node.proxy.log.clone(),
            Err(_) => self.status.pod(of).unwrap().proxy.as_ref().unwrap().log.clone(),
        };
        std::fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
    }

    /// Waits for a log line with all of these parts.
    pub fn wait_for_log(&self, of: &str, parts: &[&str]) -> String {
        let found = until(|| self.log(of).into_iter().find(|line| parts.iter().all(|part| line.contains(part))));
        found.unwrap_or_else(|| panic!("no line with {parts:?} in the log of {of}:\n{}", self.log(of).join("\n")))
    }

    /// The text of a proxy's page; `of` is a node, or a pod with a proxy of its own.
    pub fn page(&self, of: &str, port: u16, path: &str) -> (u16, String) {
        self.request(of, port, &format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"))
    }

    /// Sends a request to a proxy's page.
    pub fn request(&self, of: &str, port: u16, head: &str) -> (u16, String) {
        let place = if self.status.node(of).is_ok() { Place::Node(of) } else { Place::Pod(of) };
        let mut socket = self.run_in(place, || TcpStream::connect(("127.0.0.1", port))).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.write_all(head.as_bytes()).unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        (status, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
    }

    /// The sum of all series of a metric whose labels contain all of these parts.
    pub fn metric(&self, of: &str, name: &str, labels: &[&str]) -> f64 {
        let (_, page) = self.page(of, 15020, "/metrics");
        let of_family = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
        let chosen = page.lines().filter(of_family).filter(|line| labels.iter().all(|label| line.contains(label)));
        chosen.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    pub fn config_dump(&self, of: &str) -> serde_json::Value {
        let (status, page) = self.page(of, 15000, "/config_dump");
        assert_eq!(status, 200);
        // The page may come in chunks.
        let from = page.find('{').unwrap();
        let to = page.rfind('}').unwrap();
        serde_json::from_str(&page[from..=to]).unwrap()
    }

    /// Ends the lab and checks that nothing is left of it.
    pub fn down(self) {
        let supervisor = self.status.supervisor;
        self.lab.down().unwrap();
        assert!(!std::path::Path::new(&format!("/proc/{supervisor}")).exists(), "the supervisor is still there");
        let left = std::fs::read_dir(self.directory.path()).map_or(0, Iterator::count);
        assert_eq!(left, 0, "the run directory is not empty");
    }
}

/// Sends bytes and expects the same back.
pub fn echo_on(socket: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    socket.write_all(bytes)?;
    let mut answer = vec![0; bytes.len()];
    socket.read_exact(&mut answer)?;
    if answer == bytes { Ok(()) } else { Err(io::Error::other(format!("got {:?} back", String::from_utf8_lossy(&answer)))) }
}

/// A server that echoes on every connection, for as long as the listener lives in its thread.
pub fn serve_echo(listener: TcpListener) {
    std::thread::spawn(move || {
        for socket in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let _ = io::copy(&mut &socket, &mut &socket);
                let _ = socket.shutdown(Shutdown::Write);
            });
        }
    });
}

/// Asks again until there is an answer, for as long as anything may take.
pub fn until<T>(mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask() {
            Some(answer) => return Some(answer),
            None if Instant::now() > deadline => return None,
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Waits until something is so.
pub fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    assert!(until(|| so().then_some(())).is_some(), "not within {PATIENCE:?}: {what}");
}

impl Mesh {
    /// The configuration file of all proxies of the lab.
    pub fn mesh_file(&self) -> PathBuf {
        self.status.mesh_file.clone()
    }

    /// Puts another configuration file in place, in one step, past the lab. The next `apply` writes it anew.
    pub fn replace_mesh_file(&self, text: &str) {
        let file = self.mesh_file();
        let new = file.with_extension("test");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(&new, &file).unwrap();
    }
}

/// Whether a program of a Debian package is there. Where `CI` is `true` it must be; elsewhere its test is skipped and says so.
pub fn installed(program: &str, package: &str) -> bool {
    installed_by(program, &format!("apt-get install {package}"))
}

/// The same for a program that another command installs.
pub fn installed_by(program: &str, command: &str) -> bool {
    let path = format!("{}:/usr/local/sbin:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let found = path.split(':').any(|directory| std::path::Path::new(directory).join(program).is_file());
    if !found {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{program} is missing: {command}");
        report(&format!("skipped, because {program} is missing: {command}"));
    }
    found
}

/// Prints a line of the running test past the capture of passing tests.
pub fn report(line: &str) {
    let _ = writeln!(io::stderr(), "{}: {line}", std::thread::current().name().unwrap_or("test"));
}

/// Taken by tests that fill the machine or measure it, so that no two of them run at once.
pub fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A process of this machine, such as a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    pub pid: i32,
    started: u64,
}

impl Process {
    pub fn of(pid: i32) -> io::Result<Self> {
        Ok(Self { pid, started: culvert::sys::process::start_time(pid)? })
    }

    pub fn lives(&self) -> bool {
        // One that has ended and was not waited for yet is gone as well.
        let ended = |stat: &str| stat.rsplit_once(')').is_none_or(|(_, rest)| matches!(rest.trim_start().chars().next(), Some('Z' | 'X')));
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid));
        Self::of(self.pid).is_ok_and(|now| now == *self) && stat.is_ok_and(|stat| !ended(&stat))
    }

    /// Descriptors that it has open.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid)).unwrap().count()
    }

    /// What they are, for a message.
    pub fn open_files(&self) -> String {
        let entries = std::fs::read_dir(format!("/proc/{}/fd", self.pid)).unwrap();
        let targets = entries.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
        targets.map(|target| target.display().to_string()).collect::<Vec<_>>().join(" ")
    }

    /// Resident memory in KiB.
    pub fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
        status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok()).unwrap()
    }

    /// Percent of one CPU that it uses over a time.
    pub fn cpu(&self, over: Duration) -> f64 {
        // Clock ticks, 100 a second on every Linux that people run.
        let used = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap();
            let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
            fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
        };
        let (before, since) = (used(), Instant::now());
        std::thread::sleep(over);
        (used() - before) as f64 / since.elapsed().as_secs_f64()
    }
}

impl Mesh {
    /// The proxy of a node, or of a dedicated pod.
    pub fn proxy(&self, of: &str) -> Process {
        let status = self.status();
        let pid = match status.node(of) {
            Ok(node) => node.proxy.host_pid,
            Err(_) => status.pod(of).unwrap().proxy.as_ref().unwrap().host_pid,
        };
        assert_ne!(pid, 0, "the proxy of {of} has ended");
        Process::of(pid).unwrap()
    }
}

/// Sends something and waits for the end of the connection, which must come without a byte: as an end of stream or as a reset.
pub fn ends_without_a_byte(mut socket: TcpStream) -> Result<(), io::ErrorKind> {
    // It may have ended already.
    let _ = socket.write_all(b"GET / HTTP/1.1\r\n\r\n");
    let mut got = Vec::new();
    let ended = socket.read_to_end(&mut got);
    assert!(got.is_empty(), "an answer came: {:?}", String::from_utf8_lossy(&got));
    match ended {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => panic!("nothing within {PATIENCE:?}: neither an answer nor an end"),
        Err(error) => Err(error.kind()),
    }
}

/// A server that tells everybody its name and hangs up.
pub fn serve_name(listener: TcpListener, name: &str) {
    let name = name.to_owned();
    std::thread::spawn(move || {
        for mut socket in listener.incoming().map_while(Result::ok) {
            let _ = socket.write_all(name.as_bytes());
        }
    });
}

impl Mesh {
    /// The directory of the lab's CA.
    pub fn ca(&self) -> PathBuf {
        self.status.directory.join("ca")
    }

    /// Makes a call that must fail without a byte of an answer: the connection ends cleanly, or is reset, at the latest after it was made.
    pub fn call_fails(&self, pod: &str, target: impl Into<SocketAddr>) -> Result<(), io::ErrorKind> {
        match self.connect(pod, target) {
            Ok(socket) => ends_without_a_byte(socket),
            // A reset may be faster than we look.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Err(error.kind()),
            Err(error) => panic!("the connect itself fails: {error}"),
        }
    }

    /// What a server in the mesh says when a pod connects to it; see [`serve_name`].
    pub fn ask_name(&self, pod: &str, target: impl Into<SocketAddr>) -> io::Result<String> {
        let mut name = String::new();
        self.connect(pod, target)?.read_to_string(&mut name)?;
        Ok(name)
    }

    /// The process of a node's proxy or of a pod's own.
    pub fn proxy_pid(&self, of: &str) -> i32 {
        let status = self.status();
        let proxy = status.node(of).map(|node| node.proxy.clone());
        proxy.unwrap_or_else(|_| status.pod(of).unwrap().proxy.clone().unwrap()).host_pid
    }
}
