//! The certificates of an API server and its clients.

use std::fs;
use std::path::Path;

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};

/// Writes all that the server is given into `dir`: `ca.crt`, `server.{crt,key}`; `proxy-ca.crt`,
/// `proxy.{crt,key}`, by which it shows itself to servers that it passes requests on to; and
/// `accounts.{pub,key}`.
pub(super) fn write(dir: &Path) -> Result<()> {
    let names = ["127.0.0.1", "localhost", "kubernetes.default.svc"];
    let server = authority("api-server-ca")?;
    fs::write(dir.join("ca.crt"), server.pem())?;
    certify(
        dir,
        "server",
        &names,
        ExtendedKeyUsagePurpose::ServerAuth,
        &server,
    )?;
    let proxy = authority("proxy-ca")?;
    fs::write(dir.join("proxy-ca.crt"), proxy.pem())?;
    certify(
        dir,
        "proxy",
        &[],
        ExtendedKeyUsagePurpose::ClientAuth,
        &proxy,
    )?;
    let accounts = KeyPair::generate()?;
    fs::write(dir.join("accounts.key"), accounts.serialize_pem())?;
    fs::write(dir.join("accounts.pub"), accounts.public_key_pem())?;
    Ok(())
}

fn authority(name: &str) -> Result<CertifiedIssuer<'static, KeyPair>> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?)
}

fn certify(
    dir: &Path,
    name: &str,
    names: &[&str],
    usage: ExtendedKeyUsagePurpose,
    issuer: &CertifiedIssuer<'static, KeyPair>,
) -> Result<()> {
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.extended_key_usages = vec![usage];
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, issuer)?;
    fs::write(dir.join(format!("{name}.crt")), certificate.pem())?;
    fs::write(dir.join(format!("{name}.key")), key.serialize_pem())?;
    Ok(())
}
