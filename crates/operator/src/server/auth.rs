//! Who asks, and whether they may. The API server has asked for the first and tells it in headers
//! ("request header" authentication), which are believed with its proxy's certificate only; it is asked
//! for the second, by a SubjectAccessReview.

use std::collections::BTreeMap;

use hyper::HeaderMap;
use hyper::header::HeaderName;
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::PostParams;
use kube::{Api, Client};

use super::answer::Refusal;

/// Where the API server tells of its proxy.
pub const NAMESPACE: &str = "kube-system";
/// The ConfigMap there.
pub const CONFIG: &str = "extension-apiserver-authentication";
/// Most groups and extra values of a user.
const MAX_VALUES: usize = 1024;

/// Whom to believe names of users, and in which headers they are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Proxy {
    /// The authorities of its certificate, as PEM.
    pub authorities: String,
    /// Common names that it may have; any when empty.
    pub names: Vec<String>,
    users: Vec<String>,
    groups: Vec<String>,
    extras: Vec<String>,
}

impl Proxy {
    /// Reads what the API server tells.
    pub fn of(config: &ConfigMap) -> Self {
        let part = |name: &str| config.data.as_ref().and_then(|data| data.get(name));
        let list = |name: &str| -> Vec<String> {
            let text = part(name).map_or("[]", String::as_str);
            serde_json::from_str(text).unwrap_or_default()
        };
        Self {
            authorities: part("requestheader-client-ca-file")
                .cloned()
                .unwrap_or_default(),
            names: list("requestheader-allowed-names"),
            users: list("requestheader-username-headers"),
            groups: list("requestheader-group-headers"),
            extras: list("requestheader-extra-headers-prefix"),
        }
    }

    /// Whether a client with a certificate of that name is the proxy.
    pub fn is(&self, name: Option<&str>) -> bool {
        name.is_some_and(|name| {
            self.names.is_empty() || self.names.iter().any(|known| known == name)
        })
    }

    /// Who asks, by a client with a certificate of that name.
    ///
    /// # Errors
    /// The client is not the proxy, or names nobody.
    pub fn user(&self, name: Option<&str>, headers: &HeaderMap) -> Result<User, Refusal> {
        let Some(name) = name else {
            let message = "Ask through the cluster's API server, which shows its certificate";
            return Err(Refusal::unauthorized(message));
        };
        if !self.is(Some(name)) {
            let message = format!("{name} is not the API server's proxy");
            return Err(Refusal::unauthorized(message));
        }
        let mut values = Values::default();
        let user = self.users.iter().find_map(|header| headers.get(header));
        let name = user.and_then(|user| user.to_str().ok());
        let name = name.filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| Refusal::unauthorized("There is no user's name"))?;
        for header in &self.groups {
            for value in headers.get_all(header) {
                values.add(None, value.to_str().ok())?;
            }
        }
        for (header, value) in headers {
            if let Some(key) = self.extra(header) {
                values.add(Some(key), value.to_str().ok())?;
            }
        }
        Ok(User {
            name: name.to_owned(),
            groups: values.groups,
            extra: values.extra,
        })
    }

    /// What a header's extra values are called: escaped as in a URL, as case is lost in headers.
    fn extra(&self, header: &HeaderName) -> Option<String> {
        let header = header.as_str();
        let key = self.extras.iter().find_map(|prefix| {
            let (start, key) = header.split_at_checked(prefix.len())?;
            start.eq_ignore_ascii_case(prefix).then_some(key)
        })?;
        Some(super::path::unescape(key).unwrap_or_else(|| key.to_owned()))
    }
}

#[derive(Default)]
struct Values {
    count: usize,
    groups: Vec<String>,
    extra: BTreeMap<String, Vec<String>>,
}

impl Values {
    fn add(&mut self, key: Option<String>, value: Option<&str>) -> Result<(), Refusal> {
        self.count += 1;
        let Some(value) = value.filter(|_| self.count <= MAX_VALUES) else {
            return Err(Refusal::unauthorized("The user can't be read"));
        };
        match key {
            Some(key) => self.extra.entry(key).or_default().push(value.to_owned()),
            None => self.groups.push(value.to_owned()),
        }
        Ok(())
    }
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    name: String,
    groups: Vec<String>,
    extra: BTreeMap<String, Vec<String>>,
}

impl User {
    /// What they are called.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// What is asked for: a part of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its kind's plural.
    pub resource: &'a str,
    /// Its name; empty for none.
    pub name: &'a str,
    /// The part; empty for the object itself.
    pub part: &'a str,
    /// `get` or `update`.
    pub verb: &'a str,
}

/// Asks the cluster whether the user may.
///
/// # Errors
/// They may not, or the API server can't tell.
pub async fn authorize(client: &Client, user: &User, access: &Access<'_>) -> Result<(), Refusal> {
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let attributes = ResourceAttributes {
        group: text(super::GROUP),
        version: text(super::VERSION),
        namespace: text(access.namespace),
        resource: text(access.resource),
        subresource: text(access.part),
        name: text(access.name),
        verb: text(access.verb),
        ..ResourceAttributes::default()
    };
    let spec = SubjectAccessReviewSpec {
        user: Some(user.name.clone()),
        groups: Some(user.groups.clone()),
        extra: Some(user.extra.clone()),
        resource_attributes: Some(attributes),
        ..SubjectAccessReviewSpec::default()
    };
    let review = SubjectAccessReview {
        spec,
        ..SubjectAccessReview::default()
    };
    let reviews: Api<SubjectAccessReview> = Api::all(client.clone());
    let answer = reviews.create(&PostParams::default(), &review).await?;
    let status = answer.status.unwrap_or_default();
    if status.allowed && status.denied != Some(true) {
        return Ok(());
    }
    Err(Refusal::forbidden(denial(user, access)))
}

fn denial(user: &User, access: &Access<'_>) -> String {
    let Access {
        namespace,
        resource,
        part,
        verb,
        ..
    } = access;
    let (name, group) = (&user.name, super::GROUP);
    let slash = if part.is_empty() { "" } else { "/" };
    format!(
        "User {name:?} cannot {verb} resource \"{resource}{slash}{part}\" in API group {group:?} \
         in the namespace {namespace:?}"
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use hyper::StatusCode;

    fn proxy() -> Proxy {
        let data = [
            ("requestheader-client-ca-file", "PEM"),
            ("requestheader-allowed-names", r#"["aggregator"]"#),
            ("requestheader-username-headers", r#"["X-Remote-User"]"#),
            ("requestheader-group-headers", r#"["X-Remote-Group"]"#),
            (
                "requestheader-extra-headers-prefix",
                r#"["X-Remote-Extra-"]"#,
            ),
        ];
        let data = data.map(|(key, value)| (key.to_owned(), value.to_owned()));
        Proxy::of(&ConfigMap {
            data: Some(data.into()),
            ..ConfigMap::default()
        })
    }

    fn headers(list: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in list {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn users_are_read_from_headers() {
        let headers = headers(&[
            ("x-remote-user", "jane"),
            ("x-remote-group", "system:authenticated"),
            ("x-remote-group", "ops"),
            ("x-remote-extra-scopes%2fone", "a"),
            ("x-remote-extra-scopes%2fone", "b"),
        ]);
        let user = proxy().user(Some("aggregator"), &headers).unwrap();
        assert_eq!(user.name, "jane");
        assert_eq!(user.groups, ["system:authenticated", "ops"]);
        assert_eq!(user.extra["scopes/one"], ["a", "b"]);
    }

    #[test]
    fn nobody_else_is_believed() {
        let named = headers(&[
            ("x-remote-user", "admin"),
            ("x-remote-group", "system:masters"),
        ]);
        for (name, headers) in [
            (None, &named),
            (Some("mallory"), &named),
            (Some("aggregator"), &HeaderMap::new()),
            (Some("aggregator"), &headers(&[("x-remote-user", "")])),
        ] {
            let refusal = proxy().user(name, headers).unwrap_err();
            assert_eq!(refusal.code, StatusCode::UNAUTHORIZED, "{name:?}");
        }
        // Before anything is known of the proxy.
        Proxy::default()
            .user(Some("aggregator"), &named)
            .unwrap_err();
    }

    #[test]
    fn users_are_bounded() {
        let mut headers = headers(&[("x-remote-user", "jane")]);
        for group in 0..=MAX_VALUES {
            headers.append("x-remote-group", group.to_string().parse().unwrap());
        }
        proxy().user(Some("aggregator"), &headers).unwrap_err();
    }
}
