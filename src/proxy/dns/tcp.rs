//! DNS messages on a TCP stream: each after its length (RFC 1035, 4.2.2).

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

/// A message with its length in front, for one write. `message` has at most 65,535 bytes.
pub(super) fn framed(message: &[u8]) -> Vec<u8> {
    let message = message.get(..u16::MAX.into()).unwrap_or(message);
    let length = u16::try_from(message.len()).unwrap_or(u16::MAX);
    let mut bytes = Vec::with_capacity(2 + message.len());
    bytes.extend(length.to_be_bytes());
    bytes.extend(message);
    bytes
}

/// The next message; `None` when the stream ends between two. What was not sent takes no memory.
///
/// # Errors
/// Those of the stream; [`io::ErrorKind::UnexpectedEof`] when it ends within a message.
pub(super) async fn read_message(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 2];
    if stream.read(&mut length[..1]).await? == 0 {
        return Ok(None);
    }
    stream.read_exact(&mut length[1..]).await?;
    let length = u16::from_be_bytes(length);
    let mut message = Vec::new();
    stream.take(length.into()).read_to_end(&mut message).await?;
    if message.len() < length.into() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(message))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn messages_follow_each_other_and_one_cut_short_is_an_error() {
        let mut bytes = framed(b"first");
        bytes.extend(framed(b""));
        bytes.extend(framed(b"third"));
        let mut stream = &bytes[..];
        for expected in [&b"first"[..], b"", b"third"] {
            assert_eq!(read_message(&mut stream).await.unwrap().unwrap(), expected);
        }
        assert_eq!(read_message(&mut stream).await.unwrap(), None);
        for cut in [1, 2, 6] {
            let mut stream = &bytes[..cut];
            assert_eq!(read_message(&mut stream).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof, "after {cut} bytes");
        }
    }
}
