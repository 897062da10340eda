//! TLS, by rustls. A client need not show a certificate, as the API server has none for webhooks; one
//! that it shows has to be of the authority of the API server's proxy, and says whom to believe names
//! of users.

use std::io::Cursor;
use std::sync::Arc;

use anyhow::{Context, Result};
use rustls::RootCertStore;
use rustls::ServerConfig;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use x509_parser::parse_x509_certificate;

use super::certs::Certificates;

/// How to serve, with the authorities of the API server's proxy as PEM.
///
/// # Errors
/// Something is no certificate, or they do not belong together.
pub fn config(certificates: &Certificates, proxies: &str) -> Result<Arc<ServerConfig>> {
    let provider = provider();
    let chain = chain(&certificates.certificate).context("The certificate can't be read")?;
    let key = PrivateKeyDer::from_pem_reader(Cursor::new(&certificates.key))
        .context("The key can't be read")?;
    let mut roots = RootCertStore::empty();
    for root in self::chain(proxies).context("The proxy's authority can't be read")? {
        roots.add(root)?;
    }
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()?;
    let builder = if roots.is_empty() {
        builder.with_no_client_auth()
    } else {
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
        builder.with_client_cert_verifier(verifier.allow_unauthenticated().build()?)
    };
    let mut config = builder.with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    // The API server keeps its connections; tickets would cost memory and win nothing.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn chain(pem: &str) -> Result<Vec<CertificateDer<'static>>> {
    let certificates = CertificateDer::pem_reader_iter(Cursor::new(pem));
    Ok(certificates.collect::<Result<_, _>>()?)
}

/// The common name of a certificate that has been verified.
pub fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, certificate) = parse_x509_certificate(certificate).ok()?;
    let name = certificate.subject().iter_common_name().next()?;
    name.as_str().ok().map(ToOwned::to_owned)
}

#[cfg(test)]
pub mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::server::Settings;
    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, ClientConnection, ServerConnection};

    /// Shakes hands as a client that knows but the authority.
    pub fn shake_hands(certificates: &Certificates, settings: &Settings) {
        let mut roots = RootCertStore::empty();
        for root in chain(&certificates.authority).unwrap() {
            roots.add(root).unwrap();
        }
        let client = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = format!("{}.{}.svc", settings.service, settings.namespace);
        let name = ServerName::try_from(name).unwrap();
        let mut client = ClientConnection::new(Arc::new(client), name).unwrap();
        let config = config(certificates, &certificates.authority).unwrap();
        let mut server = ServerConnection::new(config).unwrap();
        while client.is_handshaking() || server.is_handshaking() {
            let mut bytes = Vec::new();
            client.write_tls(&mut bytes).unwrap();
            server.read_tls(&mut bytes.as_slice()).unwrap();
            server.process_new_packets().unwrap();
            let mut bytes = Vec::new();
            server.write_tls(&mut bytes).unwrap();
            client.read_tls(&mut bytes.as_slice()).unwrap();
            client.process_new_packets().unwrap();
        }
        let shown = client.peer_certificates().unwrap().first().unwrap().clone();
        assert_eq!(common_name(&shown).as_deref(), Some(&*settings.service));
    }
}
