//! `culvert lab`: a mesh in a box.

mod bench;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args as ClapArgs, Subcommand};

use crate::lab::demo::Launcher;
use crate::lab::{self, Base, FABRIC, Lab, LabState, Launch, Means, Place, Status, Wiring, programs, wire_look};

/// A mesh in a box. As root, or as any user where the kernel allows user namespaces; the machine's own network is never touched.
#[derive(Debug, ClapArgs)]
#[command(arg_required_else_help = true)]
pub(super) struct Args {
    /// Starts a small mesh, shows with real traffic what it does, and removes it; exit code 0 only if every step held.
    #[arg(long)]
    demo: bool,
    /// Directory of the run directories [default: /run/culvert/lab for root, else below $XDG_RUNTIME_DIR or /tmp].
    #[arg(long, global = true, env = "CULVERT_LAB_DIR", value_name = "DIR")]
    run_dir: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Starts the mesh that a file describes, and returns when everything in it runs.
    Up {
        /// The lab file (YAML); `-` is standard input.
        file: PathBuf,
        /// Its name.
        #[arg(long, default_value = "lab", value_parser = lab_name)]
        name: String,
        /// Stays, and ends the mesh on Ctrl-C.
        #[arg(long)]
        foreground: bool,
        /// No control plane: each proxy reads the mesh file and the CA's directory itself.
        #[arg(long = "static")]
        files: bool,
    },
    /// Makes a running mesh become what a file says: policies, services, labels and health change in place; pods come and go.
    Apply {
        /// The lab file (YAML); `-` is standard input.
        file: PathBuf,
        #[command(flatten)]
        which: Which,
    },
    /// Runs a command in a pod, with this terminal; its exit code is passed on.
    Exec {
        #[command(flatten)]
        which: Which,
        /// Runs it on a node instead (`fabric` is the network between the nodes).
        #[arg(long, value_name = "NODE")]
        node: Option<String>,
        /// Pod, as NAME or NAMESPACE/NAME.
        #[arg(required_unless_present = "node")]
        pod: Option<String>,
        /// Program and arguments.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Shows nodes, pods and services.
    Status {
        /// Everything, for programs.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        which: Which,
    },
    /// Prints the log of a node's proxy, of a pod's command or of the control plane (the lab's name: of the lab itself).
    Logs {
        /// Node, pod (NAME or NAMESPACE/NAME), `control`, or lab.
        of: String,
        #[command(flatten)]
        which: Which,
    },
    /// Ends a node's proxy and starts a new one.
    RestartProxy {
        /// The node.
        node: String,
        #[command(flatten)]
        which: Which,
    },
    /// Ends the control plane and starts a new one; the proxies go on with what they know.
    RestartControl {
        #[command(flatten)]
        which: Which,
    },
    /// Ends a mesh and everything in it; removes what a crashed one has left.
    Down {
        #[command(flatten)]
        which: Which,
        /// Every lab of this user.
        #[arg(long, conflicts_with = "name")]
        all: bool,
    },
    /// Lists the labs of this user.
    List,
    Bench(Box<bench::Args>),
    #[command(hide = true)]
    SuperviseBench {
        #[arg(long)]
        name: String,
    },
    #[command(hide = true)]
    Supervise {
        #[arg(long)]
        name: String,
        #[arg(long)]
        leash: bool,
        #[arg(long = "static")]
        files: bool,
    },
    /// Serves HTTP on a port.
    #[command(hide = true)]
    ServeHttp {
        port: u16,
        #[arg(long, env = "POD_NAME", default_value = "somebody")]
        pod: String,
    },
    /// Serves an echo on a port.
    #[command(hide = true)]
    ServeEcho {
        port: u16,
        #[arg(long)]
        greeting: Option<String>,
    },
    /// Serves the load of a bench on a port.
    #[command(hide = true)]
    ServeLoad {
        port: u16,
    },
    /// Puts load on what serve-load serves, and prints names with their values, one on a line.
    #[command(hide = true)]
    Load {
        server: std::net::SocketAddr,
        #[arg(value_enum)]
        kind: lab::bench::OneKind,
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
        connections: u16,
        #[arg(long, default_value = "5", value_parser = bench::seconds)]
        seconds: Duration,
    },
    /// Gets an http:// address.
    #[command(hide = true)]
    Get {
        url: String,
        #[arg(long)]
        header: Option<String>,
    },
    /// Sends a line to HOST:PORT and prints the line that comes back.
    #[command(hide = true)]
    Talk {
        address: String,
        text: String,
        #[arg(long)]
        hold: bool,
    },
    /// Looks at the packets of this namespace until standard input ends.
    #[command(hide = true)]
    Look {
        markers: Vec<String>,
    },
}

#[derive(Debug, ClapArgs)]
struct Which {
    /// Which lab, when there are several.
    #[arg(long)]
    name: Option<String>,
}

/// Set by Ctrl-C.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let base = Base::new(args.run_dir.unwrap_or_else(default_run_dir));
    let program = std::env::current_exe().context("cannot find the path of this program")?;
    let find = |which: &Which| Lab::find(program.clone(), base.clone(), which.name.as_deref());
    let Some(command) = args.command else {
        if !args.demo {
            bail!("say --demo or a command; --help lists them");
        }
        return demo(program, base);
    };
    if args.demo {
        bail!("--demo takes no command");
    }
    match command {
        Command::Up { file, name, foreground, files } => {
            up(Launch { program, base, name, definition: read(&file)?, leashed: foreground, wiring: wiring(files) })
        }
        Command::Apply { file, which } => {
            find(&which)?.apply(&read(&file)?).with_context(|| file.display().to_string())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Exec { which, node, pod, command } => {
            let place = match (&node, &pod) {
                (Some(node), None) => Place::Node(node),
                (None, Some(pod)) => Place::Pod(pod),
                _ => bail!("say a pod or --node, not both"),
            };
            Ok(exit_code(lab::enter_and_run(&find(&which)?, place, &command, &search_path())?))
        }
        Command::Status { json, which } => {
            let status = find(&which)?.status()?;
            if json {
                println!("{}", serde_json::to_string_pretty(&status)?);
            } else {
                print_status(&status);
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Logs { of, which } => {
            let path = find(&which)?.log(&of)?;
            let mut file = std::fs::File::open(&path).with_context(|| path.display().to_string())?;
            std::io::copy(&mut file, &mut std::io::stdout())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::RestartProxy { node, which } => {
            find(&which)?.restart_proxy(&node)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::RestartControl { which } => {
            find(&which)?.restart_control()?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Down { which, all } => down(&base, which.name, all),
        Command::List => {
            for name in base.names() {
                let state = match base.state(&name)? {
                    Some(LabState::Running(process)) => format!("running, process {}", process.id()),
                    Some(LabState::Crashed) => format!("crashed; `culvert lab down --name {name}` removes its files"),
                    None => continue,
                };
                println!("{name:20} {state}");
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Supervise { name, leash, files } => {
            let means = Means { program, search_path: search_path(), wiring: wiring(files) };
            Ok(exit_code(lab::supervise(&base, &name, means, leash)))
        }
        Command::Bench(args) => {
            watch_interrupts()?;
            bench::run(&args, &program, &base, &|| INTERRUPTED.load(Ordering::Relaxed))
        }
        Command::SuperviseBench { name } => Ok(exit_code(lab::bench::supervise(&base, &name, program))),
        small => small_program(small),
    }
}

fn wiring(files: bool) -> Wiring {
    if files { Wiring::Files } else { Wiring::Control }
}

fn search_path() -> String {
    std::env::var("PATH").unwrap_or_default()
}

fn small_program(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::ServeHttp { port, pod } => programs::serve_http(port, &pod)?,
        Command::ServeEcho { port, greeting } => programs::serve_echo(port, greeting)?,
        Command::ServeLoad { port } => lab::bench::serve_load(port)?,
        Command::Load { server, kind, connections, seconds } => {
            for (name, value) in lab::bench::run_one(server, kind, connections.into(), seconds)? {
                println!("{name} {value:.6}");
            }
        }
        Command::Get { url, header } => {
            if !programs::get(&url, header.as_deref())? {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Talk { address, text, hold } => programs::talk(&address, &text, hold)?,
        Command::Look { markers } => println!("{}", serde_json::to_string(&wire_look::look(markers)?)?),
        other => bail!("{other:?} is not a small program"),
    }
    Ok(ExitCode::SUCCESS)
}

fn demo(program: PathBuf, base: Base) -> anyhow::Result<ExitCode> {
    watch_interrupts()?;
    let name = format!("demo-{}", std::process::id());
    let held = lab::demo::run(Launcher { program, base, name, search_path: search_path() }, &|| INTERRUPTED.load(Ordering::Relaxed))?;
    Ok(if held { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn up(launch: Launch) -> anyhow::Result<ExitCode> {
    let foreground = launch.leashed;
    if foreground {
        watch_interrupts()?;
    }
    let lab = Lab::start(launch)?;
    print_status(&lab.status()?);
    if !foreground {
        println!("\n`culvert lab exec POD -- COMMAND` runs something in it, `culvert lab down` ends it");
        return Ok(ExitCode::SUCCESS);
    }
    println!("\nCtrl-C ends it");
    while !INTERRUPTED.load(Ordering::Relaxed) {
        if lab.status().is_err() {
            bail!("the lab has ended: see {}", lab.log(lab.name())?.display());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    lab.down()?;
    Ok(ExitCode::SUCCESS)
}

fn down(base: &Base, name: Option<String>, all: bool) -> anyhow::Result<ExitCode> {
    let names = base.names();
    let chosen = match (name, names.as_slice()) {
        (Some(name), _) if names.contains(&name) => vec![name],
        (Some(name), _) => bail!("there is no lab named {name}"),
        (None, []) => Vec::new(),
        (None, [name]) if !all => vec![name.clone()],
        (None, names) if all => names.to_vec(),
        (None, names) => bail!("there are several labs, say --name or --all: {}", names.join(", ")),
    };
    for name in &chosen {
        Lab::remove(base, name)?;
        println!("{name} is gone");
    }
    Ok(ExitCode::SUCCESS)
}

fn print_status(status: &Status) {
    let list = |addresses: &[std::net::IpAddr]| addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    println!("lab {}, files in {}, congestion control {}", status.name, status.directory.display(), status.congestion_control);
    if let Some(control) = &status.control {
        println!("control plane {} at {}", control.state, control.address);
    }
    println!("\n{:20} {:20} ADDRESSES", "NODE", "PROXY");
    for node in &status.nodes {
        println!("{:20} {:20} {}", node.name, node.proxy.state, list(&node.addresses));
    }
    println!("\n{:30} {:15} {:10} {:16} ADDRESSES", "POD", "NODE", "CAPTURED", "COMMAND");
    for pod in &status.pods {
        let captured = match (&pod.proxy, pod.captured) {
            (Some(_), _) => "dedicated",
            (None, true) => "yes",
            (None, false) => "no",
        };
        println!("{:30} {:15} {captured:10} {:16} {}", format!("{}/{}", pod.namespace, pod.name), pod.node, pod.state, list(&pod.addresses));
    }
    println!("\n{:50} {:15} ADDRESSES", "SERVICE", "PORTS");
    for service in &status.services {
        let ports = service.ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        println!("{:50} {ports:15} {}", service.hostname, list(&service.addresses));
    }
}

/// The first Ctrl-C (or SIGTERM) asks for an orderly end, the second one ends this process; the lab's leash then ends the lab.
fn watch_interrupts() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // Before anything is begun that an interrupt would leave half done.
    let (mut interrupt, mut terminate) = {
        let _within = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::Builder::new().name("interrupts".into()).spawn(move || {
        runtime.block_on(async {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if INTERRUPTED.swap(true, Ordering::Relaxed) {
                    std::process::exit(130);
                }
            }
        });
    })?;
    Ok(())
}

fn read(file: &std::path::Path) -> anyhow::Result<String> {
    let text = if file.as_os_str() == "-" { std::io::read_to_string(std::io::stdin()) } else { std::fs::read_to_string(file) };
    text.with_context(|| format!("cannot read {}", file.display()))
}

fn default_run_dir() -> PathBuf {
    let user = crate::sys::process::user_id();
    if user == 0 {
        return PathBuf::from("/run/culvert/lab");
    }
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(directory) if PathBuf::from(&directory).is_dir() => PathBuf::from(directory).join("culvert/lab"),
        _ => PathBuf::from(format!("/tmp/culvert-{user}/lab")),
    }
}

/// Names of labs are names of directories.
fn lab_name(text: &str) -> Result<String, String> {
    let good = !text.is_empty() && text.len() <= 30 && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
    if good && text != FABRIC { Ok(text.to_owned()) } else { Err("1 to 30 letters, digits, '-' or '_'".to_owned()) }
}

fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code.clamp(0, 255)).unwrap_or(1))
}
