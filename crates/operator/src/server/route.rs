//! From a request to its answer.

use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode};
use tokio::time::timeout;

use super::answer::{Answer, Refusal, body, json_answer};
use super::auth::{Access, authorize};
use super::path::{Kind, Part, Path};
use super::{Server, discovery, instances, machines, streams, webhooks};

/// How long an answer may take; the guest agent's own limits are below it.
const PATIENCE: Duration = Duration::from_secs(90);

/// Answers a request of a client with a certificate of that name.
pub async fn answer(
    server: &Arc<Server>,
    name: Option<&str>,
    request: Request<Incoming>,
) -> Answer {
    let served = timeout(PATIENCE, serve(server, name, request)).await;
    let late = || Err(Refusal::failed("It took too long"));
    served
        .unwrap_or_else(|_| late())
        .unwrap_or_else(|refusal| refusal.answer())
}

async fn serve(
    server: &Arc<Server>,
    name: Option<&str>,
    request: Request<Incoming>,
) -> Result<Answer, Refusal> {
    let path = request.uri().path();
    let unknown = || Refusal::not_found(format!("There is nothing at {path:?}"));
    let user = || server.proxy().user(name, request.headers());
    let verb = match *request.method() {
        Method::GET => "get",
        Method::PUT => "update",
        Method::POST if path.starts_with("/validate/") || path.starts_with("/mutate/") => {
            return webhooks::review(&server.settings, request).await;
        }
        _ => return Err(Refusal::method()),
    };
    match Path::of(path).ok_or_else(unknown)? {
        Path::Fixed(path) => {
            let document = discovery::document(&path);
            let document = document
                .ok_or_else(|| Refusal::not_found(format!("There is nothing at {path:?}")))?;
            if verb != "get" {
                return Err(Refusal::method());
            }
            Ok(document)
        }
        Path::Expand { namespace } => {
            let access = Access {
                namespace: &namespace,
                resource: "expand-vm-spec",
                name: "",
                part: "",
                verb,
            };
            authorize(&server.client, &user()?, &access).await?;
            if verb != "update" {
                return Err(Refusal::method());
            }
            let given = body(request.into_body()).await?;
            let machine = machines::expand(given, &namespace)?;
            Ok(json_answer(StatusCode::OK, &machine))
        }
        Path::Part(part) => {
            let access = Access {
                namespace: &part.namespace,
                resource: part.kind.plural(),
                name: &part.name,
                part: &part.part,
                verb,
            };
            let user = user()?;
            authorize(&server.client, &user, &access).await?;
            dispatch(server, user.name(), &part, verb, request).await
        }
    }
}

async fn dispatch(
    server: &Arc<Server>,
    user: &str,
    part: &Part,
    verb: &str,
    request: Request<Incoming>,
) -> Result<Answer, Refusal> {
    if part.part == "portforward" && verb == "get" {
        return streams::forward(server, user, part, request).await;
    }
    let words: Vec<_> = std::iter::once(&part.part)
        .chain(&part.rest)
        .map(String::as_str)
        .collect();
    match (part.kind, verb, words.as_slice()) {
        (Kind::Instance, "get", ["console"]) => streams::console(server, user, part, request).await,
        (Kind::Instance, _, [word]) if instances::is_verb(verb, word) => {
            instances::act(server, part, request).await
        }
        (Kind::Instance, "get", [word]) if instances::is_question(word) => {
            instances::ask(server, part).await
        }
        (Kind::Machine, "get", ["expand-spec"]) => machines::show(server, part).await,
        (Kind::Machine, "update", ["start"]) => machines::start(server, part, request).await,
        (Kind::Machine, "update", ["stop"]) => machines::stop(server, part, request).await,
        (Kind::Machine, "update", ["restart"]) => machines::restart(server, part, request).await,
        (kind, _, words) if is_there(kind, words) => Err(Refusal::method()),
        (kind, _, words) => Err(left_out(kind, words)),
    }
}

/// Whether there is such a part, which takes another method then.
fn is_there(kind: Kind, words: &[&str]) -> bool {
    match (kind, words) {
        (_, ["portforward", ..]) => true,
        (Kind::Instance, [word]) => {
            *word == "console" || instances::is_question(word) || instances::is_verb("update", word)
        }
        (Kind::Machine, [word]) => ["expand-spec", "start", "stop", "restart"].contains(word),
        _ => false,
    }
}

/// Why a part that KubeVirt has is not there.
fn left_out(kind: Kind, words: &[&str]) -> Refusal {
    match (kind, words) {
        (Kind::Instance, ["vnc"]) => {
            Refusal::bad("A machine has no display here: use its serial console")
        }
        (Kind::Instance, ["vnc", "screenshot"]) => {
            Refusal::bad("A machine has no display here to take a picture of")
        }
        (Kind::Instance, ["usbredir"]) => Refusal::bad("A machine has no USB ports for clients"),
        (Kind::Instance, ["vsock"]) => {
            Refusal::bad("A machine's vsock is not reached through the API")
        }
        (Kind::Machine, ["migrate"]) => {
            Refusal::conflict("A machine can't be migrated: it stays on its node")
        }
        (_, ["evacuate", "cancel"]) => {
            Refusal::conflict("There is no evacuation: machines are not migrated")
        }
        (_, ["addvolume" | "removevolume"]) => Refusal::bad(
            "Volumes can't be plugged while a machine runs: change its template and restart it",
        ),
        (Kind::Machine, ["memorydump" | "removememorydump"]) => {
            Refusal::bad("Memory can't be dumped to a claim")
        }
        (_, words) => Refusal::not_found(format!("{} have no {}", kind.plural(), words.join("/"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_take_one_method() {
        for (kind, words) in [
            (Kind::Instance, "pause"),
            (Kind::Instance, "unfreeze"),
            (Kind::Instance, "console"),
            (Kind::Instance, "guestosinfo"),
            (Kind::Instance, "portforward/22/tcp"),
            (Kind::Machine, "restart"),
            (Kind::Machine, "expand-spec"),
        ] {
            let words: Vec<_> = words.split('/').collect();
            assert!(is_there(kind, &words), "{words:?}");
        }
        assert!(!is_there(Kind::Instance, &["start"]));
        assert!(!is_there(Kind::Machine, &["pause"]));
    }

    #[test]
    fn what_is_left_out_says_why() {
        for (kind, words, code) in [
            (Kind::Instance, "vnc", 400),
            (Kind::Instance, "vnc/screenshot", 400),
            (Kind::Machine, "migrate", 409),
            (Kind::Machine, "addvolume", 400),
            (Kind::Instance, "addvolume", 400),
            (Kind::Instance, "sev/fetchcertchain", 404),
        ] {
            let words: Vec<_> = words.split('/').collect();
            let refusal = left_out(kind, &words);
            assert_eq!(refusal.code.as_u16(), code, "{words:?}");
        }
    }
}
