//! Files that clients hand to the VMM, which may open none once its sandbox is closed; see
//! [`edgevmm_api::files`] for how they come.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};

/// Most files that wait for the call that they are for.
const MOST: usize = 16;

/// The files that wait, by number.
#[derive(Debug, Clone, Default)]
pub struct HandedFiles(Arc<Mutex<Waiting>>);

#[derive(Debug, Default)]
struct Waiting {
    last: u64,
    connections: usize,
    files: BTreeMap<u64, File>,
}

impl HandedFiles {
    /// Listens at `socket` for clients with files.
    ///
    /// # Errors
    /// Fails when the socket can't be made.
    pub fn serve(socket: &Path) -> io::Result<HandedFiles> {
        let listener = UnixListener::bind(socket)?;
        let files = HandedFiles::default();
        let all = files.clone();
        tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((client, _)) => all.admit(client),
                    Err(error) => {
                        tracing::warn!(%error, "No more files can be handed to this VMM");
                        return;
                    }
                }
            }
        });
        Ok(files)
    }

    /// Takes a file. There is none by that number when its client has left.
    pub fn take(&self, number: u64) -> Option<File> {
        self.lock().files.remove(&number)
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admit(&self, client: UnixStream) {
        if self.lock().connections >= MOST {
            return;
        }
        self.lock().connections += 1;
        let files = self.clone();
        tokio::spawn(async move {
            if let Err(error) = files.keep(client).await {
                tracing::debug!(%error, "A client hands no file over");
            }
            files.lock().connections -= 1;
        });
    }

    /// Keeps the file of a client until it leaves.
    async fn keep(&self, mut client: UnixStream) -> io::Result<()> {
        let receive = || edgevmm_api::files::receive(client.as_fd());
        let file = client.async_io(Interest::READABLE, receive).await?;
        let number = {
            let mut waiting = self.lock();
            waiting.last += 1;
            let number = waiting.last;
            waiting.files.insert(number, file);
            number
        };
        let told = client.write_all(&number.to_le_bytes()).await;
        if told.is_ok() {
            // Nothing more is to come but the end.
            let _ = client.read(&mut [0]).await;
        }
        drop(self.take(number));
        told
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use edgevmm_api::files::HandedFile;

    use super::*;

    #[tokio::test]
    async fn files_wait_while_their_clients_do() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("fds.sock");
        let files = HandedFiles::serve(&socket).unwrap();
        let hand = || {
            let socket = socket.clone();
            tokio::task::spawn_blocking(move || {
                HandedFile::new(&socket, &File::open("/dev/null").unwrap())
            })
        };
        let first = hand().await.unwrap().unwrap();
        assert!(files.take(first.number()).is_some());
        assert!(files.take(first.number()).is_none());
        let second = hand().await.unwrap().unwrap();
        let number = second.number();
        assert_ne!(number, first.number());
        drop(second);
        while files.lock().connections > 1 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(files.take(number).is_none());

        let mut held = vec![first];
        for _ in 1..MOST {
            held.push(hand().await.unwrap().unwrap());
        }
        assert!(hand().await.unwrap().is_err());
        assert_eq!(files.lock().files.len(), MOST - 1);
    }
}
