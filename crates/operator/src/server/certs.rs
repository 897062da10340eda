//! Certificates that the API server believes us by: an authority of our own and what it signs, in a
//! Secret of the operator's namespace. They are made at the first start and anew before they end; the
//! authority's certificate is told to the cluster by the objects that name our service.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::core::ObjectMeta;
use kube::discovery::ApiResource;
use kube::{Api, Client};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use serde_json::{Value, json};
use time::OffsetDateTime;
use x509_parser::pem::parse_x509_pem;

use super::Settings;

/// The Secret.
const SECRET: &str = "edgevmm-operator-tls";
/// Days that certificates last.
const LIFETIME: i64 = 365;
/// Days before the end at which others are made.
const RENEWAL: i64 = 90;
/// Seconds of a day.
const DAY: i64 = 24 * 60 * 60;

/// What is served with, as PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct Certificates {
    /// The authority's certificate.
    pub authority: String,
    /// The server's certificate.
    pub certificate: String,
    /// The server's key.
    pub key: String,
}

impl std::fmt::Debug for Certificates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificates").finish_non_exhaustive()
    }
}

impl Certificates {
    /// Makes new ones for a service. The authority's key is not kept: it signs once.
    ///
    /// # Errors
    /// There is no randomness.
    fn make(settings: &Settings, now: i64) -> Result<Self> {
        let instant = |seconds| {
            OffsetDateTime::from_unix_timestamp(seconds).context("The clock is out of bounds")
        };
        // Clocks of a cluster differ.
        let (begin, end) = (instant(now - DAY)?, instant(now + LIFETIME * DAY)?);

        let mut params = CertificateParams::new(Vec::new())?;
        let name = &mut params.distinguished_name;
        name.push(DnType::CommonName, format!("edgevmm-operator@{now}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = (begin, end);
        let key = KeyPair::generate()?;
        let authority = params.self_signed(&key)?.pem();
        let issuer = Issuer::new(params, key);

        let mut params = CertificateParams::new(settings.names())?;
        let name = &mut params.distinguished_name;
        name.push(DnType::CommonName, settings.service.as_str());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) = (begin, end);
        let key = KeyPair::generate()?;
        Ok(Self {
            authority,
            certificate: params.signed_by(&key, &issuer)?.pem(),
            key: key.serialize_pem(),
        })
    }

    fn of(secret: &Secret) -> Option<Self> {
        let part = |name| {
            let ByteString(bytes) = secret.data.as_ref()?.get(name)?;
            String::from_utf8(bytes.clone()).ok()
        };
        Some(Self {
            authority: part("ca.crt")?,
            certificate: part("tls.crt")?,
            key: part("tls.key")?,
        })
    }

    fn secret(&self) -> Secret {
        let parts = [
            ("ca.crt", &self.authority),
            ("tls.crt", &self.certificate),
            ("tls.key", &self.key),
        ];
        let data = parts.map(|(name, pem)| (name.to_owned(), ByteString(pem.clone().into_bytes())));
        Secret {
            metadata: ObjectMeta {
                name: Some(SECRET.to_owned()),
                ..ObjectMeta::default()
            },
            type_: Some("kubernetes.io/tls".to_owned()),
            data: Some(data.into()),
            ..Secret::default()
        }
    }

    /// Whether they will do for long enough, for that service.
    fn will_do(&self, settings: &Settings, now: i64) -> bool {
        [&self.authority, &self.certificate]
            .iter()
            .all(|pem| valid(pem, now))
            && settings
                .names()
                .iter()
                .all(|name| names(&self.certificate, name))
    }
}

fn valid(pem: &str, now: i64) -> bool {
    let Ok((_, pem)) = parse_x509_pem(pem.as_bytes()) else {
        return false;
    };
    pem.parse_x509().is_ok_and(|certificate| {
        let validity = certificate.validity();
        let left = validity.not_after.timestamp().saturating_sub(now);
        validity.not_before.timestamp() <= now && left > RENEWAL * DAY
    })
}

fn names(pem: &str, name: &str) -> bool {
    let Ok((_, pem)) = parse_x509_pem(pem.as_bytes()) else {
        return false;
    };
    let Ok(certificate) = pem.parse_x509() else {
        return false;
    };
    let Ok(Some(alternatives)) = certificate.subject_alternative_name() else {
        return false;
    };
    let names = &alternatives.value.general_names;
    names
        .iter()
        .any(|known| matches!(known, x509_parser::extensions::GeneralName::DNSName(known) if *known == name))
}

/// Seconds since 1970.
fn now() -> Result<i64> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH)?;
    Ok(i64::try_from(since.as_secs())?)
}

/// The certificates of the cluster: those that are there, or new ones.
///
/// # Errors
/// The API server can't be asked, or does not take them.
pub async fn ensure(client: &Client, settings: &Settings) -> Result<Certificates> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), &settings.namespace);
    let old = secrets
        .get_opt(SECRET)
        .await
        .context("Can't read the operator's certificates")?;
    let now = now()?;
    let known = old.as_ref().and_then(Certificates::of);
    if let Some(known) = known.filter(|known| known.will_do(settings, now)) {
        return Ok(known);
    }
    let new = Certificates::make(settings, now)?;
    if let Some(old) = old {
        // Its type can't be changed, and another operator may have made it anew meanwhile.
        let conditions = Preconditions {
            uid: old.metadata.uid,
            resource_version: old.metadata.resource_version,
        };
        let params = DeleteParams {
            preconditions: Some(conditions),
            ..DeleteParams::default()
        };
        secrets
            .delete(SECRET, &params)
            .await
            .context("Can't replace the operator's certificates")?;
    }
    let created = secrets.create(&PostParams::default(), &new.secret()).await;
    created.context("Can't keep the operator's certificates")?;
    Ok(new)
}

/// Tells the cluster whom to believe: wherever our service is named, our authority is.
///
/// # Errors
/// The API server can't be asked, or does not take it. What is not installed is left out.
pub async fn publish(client: &Client, authority: &str) -> Result<()> {
    let bundle = BASE64.encode(authority);
    let service = resource("apiregistration.k8s.io", "APIService", "apiservices");
    let patch = json!({ "spec": { "caBundle": bundle } });
    let services: Api<kube::core::DynamicObject> = Api::all_with(client.clone(), &service);
    apply(&services, super::API_SERVICE, &patch).await?;
    for (kind, plural) in [
        (
            "MutatingWebhookConfiguration",
            "mutatingwebhookconfigurations",
        ),
        (
            "ValidatingWebhookConfiguration",
            "validatingwebhookconfigurations",
        ),
    ] {
        let resource = resource("admissionregistration.k8s.io", kind, plural);
        let hooks: Api<kube::core::DynamicObject> = Api::all_with(client.clone(), &resource);
        let Some(found) = hooks.get_opt(super::WEBHOOKS).await? else {
            continue;
        };
        let webhooks = found.data.get("webhooks").cloned().unwrap_or_default();
        let webhooks = with_bundle(webhooks, &bundle);
        apply(&hooks, super::WEBHOOKS, &json!({ "webhooks": webhooks })).await?;
    }
    Ok(())
}

fn with_bundle(mut webhooks: Value, bundle: &str) -> Value {
    for webhook in webhooks.as_array_mut().into_iter().flatten() {
        let config = webhook.get_mut("clientConfig");
        if let Some(config) = config.and_then(Value::as_object_mut) {
            config.insert("caBundle".to_owned(), bundle.into());
        }
    }
    webhooks
}

fn resource(group: &str, kind: &str, plural: &str) -> ApiResource {
    ApiResource {
        group: group.to_owned(),
        version: "v1".to_owned(),
        api_version: format!("{group}/v1"),
        kind: kind.to_owned(),
        plural: plural.to_owned(),
    }
}

async fn apply(api: &Api<kube::core::DynamicObject>, name: &str, patch: &Value) -> Result<()> {
    match api
        .patch(name, &PatchParams::default(), &Patch::Merge(patch))
        .await
    {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => Err(anyhow!(error).context(format!("Can't write the authority into {name}"))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn certificates_are_renewed_before_they_end() {
        let settings = Settings::example();
        let begin = 1_800_000_000;
        let made = Certificates::make(&settings, begin).unwrap();
        assert_eq!(Certificates::of(&made.secret()).unwrap(), made);
        assert!(made.will_do(&settings, begin));
        assert!(made.will_do(&settings, begin + (LIFETIME - RENEWAL - 1) * DAY));
        assert!(!made.will_do(&settings, begin + (LIFETIME - RENEWAL) * DAY));
        // A clock that was far ahead.
        assert!(!made.will_do(&settings, begin - 2 * DAY));
        let elsewhere = Settings {
            namespace: "other".to_owned(),
            ..settings
        };
        assert!(!made.will_do(&elsewhere, begin));
    }

    #[test]
    fn the_server_is_believed_by_its_authority() {
        let settings = Settings::example();
        let made = Certificates::make(&settings, now().unwrap()).unwrap();
        crate::server::tls::tests::shake_hands(&made, &settings);
    }

    #[test]
    fn every_webhook_gets_the_bundle() {
        let hooks = json!([{ "name": "a", "clientConfig": { "service": {} } }, { "name": "b" }]);
        let hooks = with_bundle(hooks, "QQ==");
        assert_eq!(hooks[0]["clientConfig"]["caBundle"], "QQ==");
        assert_eq!(hooks[1], json!({ "name": "b" }));
    }
}
