//! The protocol, with an API that only records the requests.

use std::io::{BufRead as _, BufReader};
use std::sync::Mutex;

use nix::unistd::geteuid;
use serde_json::{Value, json};
use snaprestore_engine::stats::{Durations, PageCounts, Stats};

use super::*;
use crate::api::types::{VmState, VmStatus};

/// An API that records requests, has VM 3, and refuses everything named "no".
#[derive(Default)]
struct Fake {
    asked: Mutex<Vec<String>>,
}

impl Fake {
    fn note(&self, what: String) {
        self.asked.lock().unwrap().push(what);
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }

    fn vm() -> VmStats {
        VmStats {
            vm: VmStatus {
                id: 3,
                service: "web".into(),
                pid: 77,
                state: VmState::Serving,
                reason: None,
                age_ms: 1500,
            },
            session: Stats {
                pages: 1000,
                missing: 10,
                faults: 4,
                fault_time: Durations::new(
                    vec![(2000, 3), (5000, 1)],
                    Duration::from_micros(9),
                    Duration::from_nanos(4900),
                ),
                demand: PageCounts {
                    copied: 16,
                    ..PageCounts::default()
                },
                ..Stats::default()
            },
        }
    }
}

impl OperatorApi for Fake {
    fn add(&self, service: Service) -> ApiResult<()> {
        self.note(format!("add {}", service.name));
        Ok(())
    }

    fn remove(&self, name: &str) -> ApiResult<()> {
        self.note(format!("remove {name}"));
        if name == "no" {
            return Err(RequestError::no_service(name));
        }
        Ok(())
    }

    fn list(&self) -> ApiResult<List> {
        self.note("list".into());
        Ok(List {
            version: "1".into(),
            vms: vec![Self::vm().vm],
            ..List::default()
        })
    }

    fn start_recording(&self, vm: VmId) -> ApiResult<()> {
        self.note(format!("record {vm}"));
        Ok(())
    }

    fn stop_recording(&self, vm: VmId) -> ApiResult<Recorded> {
        Err(RequestError::no_vm(vm))
    }

    fn stats(&self, vm: Option<VmId>) -> ApiResult<Vec<VmStats>> {
        self.note(format!("stats {vm:?}"));
        match vm {
            None | Some(3) => Ok(vec![Self::vm()]),
            Some(id) => Err(RequestError::no_vm(id)),
        }
    }

    fn complete(&self, which: VmSelector) -> ApiResult<Vec<Completed>> {
        self.note(format!("complete {which:?}"));
        Ok(vec![Completed {
            vm: 3,
            done: true,
            reason: None,
        }])
    }

    fn drain(&self) -> ApiResult<Vec<Completed>> {
        self.note("drain".into());
        Ok(Vec::new())
    }

    fn upgrade(&self, program: Option<PathBuf>) -> ApiResult<Upgraded> {
        self.note(format!("upgrade {program:?}"));
        Ok(Upgraded {
            from: "1".into(),
            to: "2".into(),
        })
    }
}

/// Sends all of `sent` at once, and returns the replies until the connection ends.
fn replies(api: &Fake, sent: &[u8]) -> Vec<Value> {
    let (here, there) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || serve(&there, geteuid().as_raw(), api));
        scope.spawn({
            let mut here = here.try_clone().unwrap();
            move || {
                // The connection is refused in the middle of a line that is too long.
                let _ = here.write_all(sent);
                let _ = here.shutdown(std::net::Shutdown::Write);
            }
        });
        // Data that was sent but not read resets the connection, after the reply.
        let lines = BufReader::new(&here).lines().map_while(Result::ok);
        lines
            .map(|line| serde_json::from_str(&line).unwrap())
            .collect()
    })
}

fn reply(api: &Fake, request: &Value) -> Value {
    let [reply] = &replies(api, format!("{request}\n").as_bytes())[..] else {
        panic!("not one reply to {request}");
    };
    reply.clone()
}

#[test]
fn every_request_reaches_the_api() {
    let api = Fake::default();
    let service = json!({"name": "web", "snapshot": "/s", "socket": "/run/s"});
    let done = json!({"ok": [{"vm": 3, "done": true}]});
    for (request, expected) in [
        (json!({"op": "add", "service": service}), json!({"ok": {}})),
        (json!({"op": "remove", "name": "web"}), json!({"ok": {}})),
        (json!({"op": "complete", "vm": 3}), done.clone()),
        (json!({"op": "complete", "all": true}), done),
        (json!({"op": "drain"}), json!({"ok": []})),
        (
            json!({"op": "upgrade", "program": "/bin/new"}),
            json!({"ok": {"from": "1", "to": "2"}}),
        ),
        (
            json!({"op": "upgrade"}),
            json!({"ok": {"from": "1", "to": "2"}}),
        ),
    ] {
        assert_eq!(reply(&api, &request), expected, "{request}");
    }
    let list = reply(&api, &json!({"op": "list"}));
    assert_eq!(list["ok"]["vms"][0]["state"], "serving", "{list}");
    let stats = reply(&api, &json!({"op": "stats", "vm": 3}));
    let vm = &stats["ok"][0];
    assert_eq!((&vm["id"], &vm["missing"]), (&json!(3), &json!(10)));
    assert_eq!(vm["fault_us"]["p99"], 4.9, "{stats}");
    assert!(vm["fault_us"].get("buckets").is_none(), "{stats}");
    let stats = reply(&api, &json!({"op": "stats", "buckets": true}));
    let buckets = &stats["ok"][0]["fault_us"]["buckets"];
    assert_eq!(*buckets, json!([[2000, 3], [5000, 1]]));
    let asked = api.asked();
    let expected = [
        "add web",
        "remove web",
        "complete Vm(3)",
        "complete All",
        "drain",
        "upgrade Some(\"/bin/new\")",
        "upgrade None",
        "list",
        "stats Some(3)",
        "stats None",
    ];
    assert_eq!(asked, expected);
}

#[test]
fn invalid_request_is_refused_and_next_is_read() {
    let api = Fake::default();
    let wrong: &[(&str, &str)] = &[
        ("", "invalid request"),
        ("[]", "invalid request"),
        ("{\"op\":\"stop\"}", "unknown variant `stop`"),
        ("{\"op\":\"list\",\"all\":true}", "all"),
        ("{\"op\":\"remove\"}", "name"),
        ("{\"op\":\"complete\"}", "one VM, or all"),
        (
            "{\"op\":\"complete\",\"vm\":3,\"all\":true}",
            "one VM, or all",
        ),
        ("{\"op\":\"stats\",\"vm\":4}", "no VM 4"),
        ("{\"op\":\"remove\",\"name\":\"no\"}", "no service \"no\""),
        (
            "{\"op\":\"add\",\"service\":{\"name\":\"a\",\"snapshot\":\"s\",\"socket\":\"/s\"}}",
            "begin with /",
        ),
        (
            "{\"op\":\"add\",\"service\":{\"name\":\"a\",\"snapshot\":\"/s\",\"socket\":\"/s\",\"x\":1}}",
            "unknown field `x`",
        ),
        ("\u{0}\u{1}", "invalid request"),
    ];
    let mut sent = String::new();
    for (line, _) in wrong {
        sent.push_str(line);
        sent.push('\n');
    }
    sent.push_str("{\"op\":\"list\"}\n");
    let replies = replies(&api, sent.as_bytes());
    assert_eq!(replies.len(), wrong.len() + 1, "{replies:?}");
    for ((line, says), reply) in wrong.iter().zip(&replies) {
        let error = reply["error"].as_str().unwrap_or_default();
        assert!(error.contains(says), "{line}: {reply}");
    }
    assert_eq!(replies[wrong.len()]["ok"]["version"], "1");
    // Only requests that could be parsed have reached the API.
    assert_eq!(api.asked(), ["stats Some(4)", "remove no", "list"]);
}

#[test]
fn endless_line_ends_the_connection_at_its_limit() {
    let api = Fake::default();
    let replies = replies(&api, &vec![b'x'; 4 << 20]);
    // The kernel may drop the reply together with the unread data.
    assert!(replies.len() <= 1, "{replies:?}");
    for reply in replies {
        let error = reply["error"].as_str().unwrap();
        assert!(error.contains("longer than 65536 bytes"), "{error}");
    }
    assert!(api.asked().is_empty());
}

#[test]
fn unterminated_line_is_no_request() {
    let api = Fake::default();
    let replies = replies(&api, b"{\"op\":\"drain\"}");
    assert_eq!(replies.len(), 1, "{replies:?}");
    assert!(replies[0].get("error").is_some(), "{replies:?}");
    assert!(api.asked().is_empty());
}

#[test]
fn silent_client_times_out() {
    let (here, _there) = UnixStream::pair().unwrap();
    let mut lines = Lines::new(&here, 100);
    let until = Instant::now() + Duration::from_millis(20);
    let error = lines.next(Some(until)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert!(error.to_string().contains("timed out"), "{error}");
    // Neither does a client get more time by sending more bytes of a line.
    let error = lines.next(Some(until)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
}

#[test]
fn only_own_user_and_root_may_control() {
    assert!(may_use(1000, 1000));
    assert!(may_use(0, 1000));
    assert!(may_use(0, 0));
    assert!(!may_use(1001, 1000));
    assert!(!may_use(1000, 0));
}

#[test]
fn control_socket_is_private_from_the_start() {
    use std::os::unix::fs::PermissionsExt as _;

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control");
    let _listener = listen_at(&path).unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let error = listen_at(&path).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{error}");
}

#[test]
fn client_gets_the_reply_of_the_api() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control");
    let Err(error) = Client::connect(&path) else {
        panic!("nobody is there");
    };
    assert!(
        error.to_string().contains("no daemon listens on"),
        "{error}"
    );
    let listener = listen_at(&path).unwrap();
    let api = Fake::default();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (stream, _) = listener.accept().unwrap();
            serve(&stream, geteuid().as_raw(), &api);
        });
        let client = Client::connect(&path).unwrap();
        let ask = Request::Stats {
            vm: Some(3),
            buckets: true,
        };
        client.send(&ask).unwrap();
        let stats: Vec<VmStats> = client.receive(false).unwrap();
        assert_eq!(stats, [Fake::vm()]);
        client
            .send(&Request::Stats {
                vm: Some(9),
                buckets: false,
            })
            .unwrap();
        let error = client.receive::<Vec<VmStats>>(false).unwrap_err();
        assert!(error.to_string().contains("no VM 9"), "{error}");
        client
            .send(&Request::Complete {
                vm: None,
                all: true,
            })
            .unwrap();
        let done: Vec<Completed> = client.receive(true).unwrap();
        assert!(done[0].done);
    });
    drop(listener);
    let Err(error) = Client::connect(&path) else {
        panic!("nobody listens");
    };
    assert!(error.to_string().contains("the daemon exited"), "{error}");
}
