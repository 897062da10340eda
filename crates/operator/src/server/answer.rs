//! Answers: JSON, and errors as `metav1.Status`, which is what clients of a cluster print.

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Bytes};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

/// An answer.
pub type Answer = Response<Full<Bytes>>;

/// Longest body that is read: etcd takes objects up to 1.5 MiB, and a review has two of them.
const MAX_BODY: usize = 4 << 20;
/// Most values in one, about.
const MAX_VALUES: usize = 200_000;

/// Why a request is not served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Of HTTP.
    pub code: StatusCode,
    /// In one word, as clients compare it.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

impl Refusal {
    fn new(code: StatusCode, reason: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self {
            code,
            reason,
            message,
        }
    }

    /// The request makes no sense, or not now.
    pub fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequest", message)
    }

    /// It is not known who asks.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "Unauthorized", message)
    }

    /// Who asks may not.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "Forbidden", message)
    }

    /// There is no such thing.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "NotFound", message)
    }

    /// The path knows no such method.
    pub fn method() -> Self {
        let message = "The path is there, and does not take this method";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", message)
    }

    /// The object is in no state for it.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "Conflict", message)
    }

    /// It was tried and failed.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", message)
    }

    /// There are too many at it already.
    pub fn busy(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "ServiceUnavailable",
            message,
        )
    }

    /// Who asks has too many at it already.
    pub fn too_many(message: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "TooManyRequests", message)
    }

    /// As an answer.
    pub fn answer(&self) -> Answer {
        let status = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code.as_u16(),
        });
        json_answer(self.code, &status)
    }
}

impl From<kube::Error> for Refusal {
    /// What the API server refused is refused with its words; all else is our failure.
    fn from(error: kube::Error) -> Self {
        let kube::Error::Api(status) = error else {
            return Self::failed(format!("Can't ask the API server: {error}"));
        };
        match status.code {
            403 => Self::failed(format!("The operator may not: {}", status.message)),
            404 => Self::not_found(status.message),
            409 => Self::conflict(status.message),
            400 | 422 => Self::bad(status.message),
            _ => Self::failed(status.message),
        }
    }
}

/// A value as an answer.
pub fn json_answer(code: StatusCode, value: &impl Serialize) -> Answer {
    match serde_json::to_vec(value) {
        Ok(body) => typed(code, "application/json", body),
        Err(error) => typed(
            StatusCode::INTERNAL_SERVER_ERROR,
            "text/plain",
            error.to_string().into_bytes(),
        ),
    }
}

/// An answer without a body.
pub fn empty(code: StatusCode) -> Answer {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = code;
    answer
}

/// An answer of a type.
pub fn typed(code: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = code;
    let kind = HeaderValue::from_static(kind);
    answer.headers_mut().insert(CONTENT_TYPE, kind);
    answer
}

/// The body of a request; an empty one is the type's default.
///
/// # Errors
/// It is too long, no JSON, or of another type.
pub async fn body<T, B>(body: B) -> Result<T, Refusal>
where
    T: DeserializeOwned + Default,
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let read = Limited::new(body, MAX_BODY).collect().await;
    let bytes = read
        .map_err(|_| {
            Refusal::bad(format!(
                "The body can't be read, or has over {MAX_BODY} bytes"
            ))
        })?
        .to_bytes();
    if bytes.trim_ascii().is_empty() {
        return Ok(T::default());
    }
    // A parsed value takes some seventy bytes, however short its text is.
    let values = bytes
        .iter()
        .filter(|byte| matches!(byte, b'[' | b'{' | b','));
    if values.count() > MAX_VALUES {
        return Err(Refusal::bad(format!(
            "The body has over {MAX_VALUES} values"
        )));
    }
    serde_json::from_slice(&bytes)
        .map_err(|error| Refusal::bad(format!("The body is not as expected: {error}")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::Value;

    #[tokio::test]
    async fn bodies_are_bounded_and_may_be_empty() {
        let long = Full::new(Bytes::from(vec![b' '; MAX_BODY + 1]));
        assert_eq!(
            body::<Value, _>(long).await.unwrap_err().code,
            StatusCode::BAD_REQUEST
        );
        let many = Full::new(Bytes::from("[[],".repeat(MAX_VALUES / 2)));
        let refused = body::<Value, _>(many).await.unwrap_err();
        assert!(refused.message.contains("values"), "{}", refused.message);
        let empty = Full::new(Bytes::from_static(b" \n"));
        assert_eq!(body::<Value, _>(empty).await.unwrap(), Value::Null);
        let torn = Full::new(Bytes::from_static(b"{\"paused\":"));
        body::<Value, _>(torn).await.unwrap_err();
    }

    #[tokio::test]
    async fn refusals_are_statuses() {
        let answer = Refusal::conflict("VM is already running").answer();
        assert_eq!(answer.status(), 409);
        let bytes = answer.into_body().collect().await.unwrap().to_bytes();
        let status: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(status["kind"], "Status");
        assert_eq!(status["code"], 409);
        assert_eq!(status["reason"], "Conflict");
    }
}
