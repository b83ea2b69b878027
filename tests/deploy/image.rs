//! The image, built from a local binary without pulling anything, and run.

use std::fs;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::rights::namespace;
use super::{deploy, has, printed, run, skipped};

/// Where a static binary is; how to make one is in `.ci/run`.
fn static_binary() -> Option<PathBuf> {
    let found = std::env::var_os("CULVERT_STATIC_BINARY").map(PathBuf::from);
    if found.is_none() {
        skipped("CULVERT_STATIC_BINARY does not name a static binary: cargo rustc --bin culvert -- -C target-feature=+crt-static");
    }
    found
}

/// The static binary, where an image can be built from it and run.
pub(super) fn prepared() -> Option<PathBuf> {
    // An image holds files of root.
    if !nix::unistd::geteuid().is_root() {
        skipped("building an image here needs root");
        return None;
    }
    let binary = static_binary()?;
    ["buildah", "readelf", "tar", "ip"].into_iter().all(has).then_some(binary)
}

/// A place for images that is gone with the test.
pub(super) struct Images {
    folder: tempfile::TempDir,
}

impl Images {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().display();
        let storage = format!("[storage]\ndriver = \"vfs\"\ngraphroot = \"{place}/images\"\nrunroot = \"{place}/run\"\n");
        fs::write(folder.path().join("storage.conf"), storage).unwrap();
        Self { folder }
    }

    /// A program that keeps its images here, and nothing anywhere else: buildah has a cache below /var/lib that cannot be told to be elsewhere.
    pub(super) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", "mount -t tmpfs none /var/lib && exec \"$@\"", "sh"]).arg(program);
        command.env("CONTAINERS_STORAGE_CONF", self.folder.path().join("storage.conf")).env("BUILDAH_ISOLATION", "chroot");
        command
    }

    /// A folder that is gone with it.
    pub(super) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Builds the image and returns the folder of its archive, unpacked.
    pub(super) fn build(&self, binary: &Path, name: &str) -> PathBuf {
        let archive = self.folder.path().join(format!("{name}.tar"));
        let mut build = self.command(deploy("image/build.sh"));
        printed(build.args(["--tool", "buildah", "--tag", "culvert:dev", "--binary"]).arg(binary).arg("--output").arg(&archive));
        let unpacked = self.folder.path().join(name);
        fs::create_dir(&unpacked).unwrap();
        printed(Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(&unpacked));
        unpacked
    }
}

fn read(path: impl AsRef<Path>) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn the_image_is_one_static_file_which_finds_names_in_files_and_in_dns() {
    let Some(binary) = prepared() else { return };
    let images = Images::new();
    let archive = images.build(&binary, "first");
    let manifest = read(archive.join("manifest.json"));
    let [image] = manifest.as_array().unwrap().as_slice() else { panic!("{manifest}") };
    assert!(image["RepoTags"].as_array().unwrap().iter().any(|tag| tag.as_str().unwrap().ends_with("library/culvert:dev")), "{manifest}");
    let [layer] = image["Layers"].as_array().unwrap().as_slice() else { panic!("{manifest}") };
    let listed = printed(Command::new("tar").arg("--numeric-owner").arg("-tvf").arg(archive.join(layer.as_str().unwrap())));
    let [file] = listed.lines().collect::<Vec<_>>()[..] else { panic!("{listed}") };
    assert!(file.starts_with("-rwxr-xr-x 0/0 ") && file.ends_with(" culvert"), "{file}");

    let config = read(archive.join(image["Config"].as_str().unwrap()));
    assert_eq!(config["config"]["Entrypoint"], json!(["/culvert"]));
    assert_eq!(config["config"]["Cmd"], json!(["proxy"]));
    assert_eq!(config["config"]["WorkingDir"], json!("/"));
    assert_eq!(config["config"].get("User"), None, "the DaemonSet says who it runs as");

    let again = read(images.build(&binary, "second").join("manifest.json"));
    assert_eq!(again[0]["Config"], image["Config"], "the same binary gives the same image");
    the_program_runs_and_finds_names(&images);
}

/// A static glibc looks names up without the libraries that a usual one loads for it: this breaks with one before 2.34.
fn the_program_runs_and_finds_names(images: &Images) {
    // /etc/resolv.conf and /etc/hosts as the kubelet writes them.
    let mut from = images.command("buildah");
    from.args(["from", "--pull-never", "--dns", "127.0.0.1", "--dns-option", "ndots:5", "--add-host", "in-a-file:127.0.0.1"]);
    from.args(["istio-system.svc.cluster.local", "svc.cluster.local", "cluster.local"].map(|domain| format!("--dns-search={domain}")));
    let container = printed(from.arg("culvert:dev")).trim().to_owned();
    // Only exit codes count: on a busy machine buildah may lose what a program said last.
    printed(images.command("buildah").args(["run", &container, "/culvert", "version"]));

    let netns = namespace();
    let dns = netns.run(|| UdpSocket::bind("127.0.0.1:53")).unwrap().unwrap();
    std::thread::spawn(move || answer(&dns));
    let mut server =
        netns.run(|| Command::new(env!("CARGO_BIN_EXE_culvert")).args(["lab", "serve-http", "8080", "--pod", "web"]).spawn()).unwrap().unwrap();
    let there = || netns.run(|| std::net::TcpStream::connect("127.0.0.1:8080")).unwrap().is_ok();
    while !there() {
        assert!(server.try_wait().unwrap().is_none(), "the server has ended");
        std::thread::yield_now();
    }
    let get = |url: &str| {
        let mut command = images.command("buildah");
        command.args(["run", "--cap-drop", "all", "--user", "0:1337", &container, "/culvert", "lab", "get", url]);
        netns.run(|| run(&mut command)).unwrap()
    };
    let outputs = ["web.default.svc:8080", "in-a-file:8080", "nowhere.default.svc:8080"].map(|name| get(&format!("http://{name}/")));
    server.kill().unwrap();
    server.wait().unwrap();
    // `lab get` succeeds when the answer's status was 200.
    assert_eq!(outputs.each_ref().map(|output| output.status.success()), [true, true, false], "{outputs:?}");
}

/// Answers DNS: web.default.svc.cluster.local and istiod.istio-system.svc.cluster.local are 127.0.0.1, nothing else exists.
pub(super) fn answer(socket: &UdpSocket) {
    const NAMES: [&[u8]; 2] = [b"\x03web\x07default\x03svc\x07cluster\x05local\0", b"\x06istiod\x0cistio-system\x03svc\x07cluster\x05local\0"];
    let mut query = [0; 512];
    while let Ok((length, client)) = socket.recv_from(&mut query) {
        let question = &query[12..length];
        // The name, two bytes of type, two of class.
        let end = question.iter().position(|byte| *byte == 0).unwrap() + 5;
        let is_ours = NAMES.iter().any(|name| question.starts_with(name));
        let answers = u8::from(is_ours && question[end - 4..].starts_with(&[0, 1]));
        let mut reply = vec![query[0], query[1], 0x81, if is_ours { 0x80 } else { 0x83 }, 0, 1, 0, answers, 0, 0, 0, 0];
        reply.extend_from_slice(&question[..end]);
        if answers == 1 {
            reply.extend_from_slice(b"\xc0\x0c\0\x01\0\x01\0\0\0\x05\0\x04\x7f\0\0\x01");
        }
        socket.send_to(&reply, client).unwrap();
    }
}
