//! The certificates of an API server and its clients.

use std::fs;
use std::path::Path;

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};

/// A file's name and text.
type File = (String, String);

/// Writes all that the server is given into `dir`: `ca.crt`, `server.{crt,key}`; those of [`proxy`]; and
/// `accounts.{pub,key}`.
pub(super) fn write(dir: &Path) -> Result<()> {
    let names = ["127.0.0.1", "localhost", "kubernetes.default.svc"];
    let server = authority("api-server-ca")?;
    let usage = ExtendedKeyUsagePurpose::ServerAuth;
    let accounts = KeyPair::generate()?;
    let own = [
        ("ca.crt".to_owned(), server.pem()),
        ("accounts.key".to_owned(), accounts.serialize_pem()),
        ("accounts.pub".to_owned(), accounts.public_key_pem()),
    ];
    let certified = certify("server", &names, usage, &server)?;
    for (name, text) in own.into_iter().chain(certified).chain(proxy()?) {
        fs::write(dir.join(name), text)?;
    }
    Ok(())
}

/// `proxy-ca.crt`, `proxy.{crt,key}`, by which an API server shows itself to servers that it passes
/// requests on to.
pub(crate) fn proxy() -> Result<Vec<File>> {
    let authority = authority("proxy-ca")?;
    let usage = ExtendedKeyUsagePurpose::ClientAuth;
    let mut files = certify("proxy", &[], usage, &authority)?.to_vec();
    files.push(("proxy-ca.crt".to_owned(), authority.pem()));
    Ok(files)
}

/// The API server's options for that, with files where `path` says.
pub(crate) fn proxy_options(path: impl Fn(&str) -> String) -> [(&'static str, String); 7] {
    let prefix = "X-Remote-Extra-".to_owned();
    [
        ("requestheader-client-ca-file", path("proxy-ca.crt")),
        ("requestheader-allowed-names", "proxy".to_owned()),
        ("requestheader-username-headers", "X-Remote-User".to_owned()),
        ("requestheader-group-headers", "X-Remote-Group".to_owned()),
        ("requestheader-extra-headers-prefix", prefix),
        ("proxy-client-cert-file", path("proxy.crt")),
        ("proxy-client-key-file", path("proxy.key")),
    ]
}

fn authority(name: &str) -> Result<CertifiedIssuer<'static, KeyPair>> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?)
}

fn certify(
    name: &str,
    names: &[&str],
    usage: ExtendedKeyUsagePurpose,
    issuer: &CertifiedIssuer<'static, KeyPair>,
) -> Result<[File; 2]> {
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.extended_key_usages = vec![usage];
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, issuer)?;
    Ok([
        (format!("{name}.crt"), certificate.pem()),
        (format!("{name}.key"), key.serialize_pem()),
    ])
}
