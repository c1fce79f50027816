//! A scripted HTTP server on 127.0.0.1 that misbehaves on demand and remembers what it was asked.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::Duration;

/// What a client asked for.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) path: String,
    headers: Vec<(String, String)>,
}

impl Asked {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }
}

/// One answer, good or bad.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    /// Answers `Range` requests from this body as a good server does.
    ranges: bool,
    announce: bool,
    body: Vec<u8>,
    /// How many bytes of the answer's body are sent before the connection closes.
    sends: usize,
    /// Silence after these bytes.
    then_waits: Duration,
}

impl Reply {
    pub(crate) fn status(status: u16, body: impl Into<Vec<u8>>) -> Reply {
        Reply {
            status,
            headers: Vec::new(),
            ranges: false,
            announce: true,
            body: body.into(),
            sends: usize::MAX,
            then_waits: Duration::ZERO,
        }
    }

    /// Status 200 with this body, ranges not supported.
    pub(crate) fn body(body: &[u8]) -> Reply {
        Reply::status(200, body)
    }

    /// The same from a server that supports ranges.
    pub(crate) fn file(body: &[u8]) -> Reply {
        Reply {
            ranges: true,
            ..Reply::body(body)
        }
    }

    pub(crate) fn header(mut self, name: &'static str, value: impl Into<String>) -> Reply {
        self.headers.push((name, value.into()));
        self
    }

    pub(crate) fn dropped_after(self, sends: usize) -> Reply {
        Reply { sends, ..self }
    }

    pub(crate) fn stalled_after(self, sends: usize, then_waits: Duration) -> Reply {
        Reply {
            sends,
            then_waits,
            ..self
        }
    }

    /// Without Content-Length: the body ends with the connection.
    pub(crate) fn unannounced(self) -> Reply {
        Reply {
            announce: false,
            ..self
        }
    }

    fn write(self, asked: &Asked, stream: &mut TcpStream) -> std::io::Result<()> {
        let (mut status, mut headers, mut body) = (self.status, self.headers, &self.body[..]);
        let start = asked.header("range").and_then(|range| {
            range
                .strip_prefix("bytes=")?
                .strip_suffix('-')?
                .parse()
                .ok()
        });
        if let (true, Some(start)) = (self.ranges, start) {
            let total = body.len();
            if start < total {
                (status, body) = (206, &body[start..]);
                headers.push((
                    "Content-Range",
                    format!("bytes {start}-{}/{total}", total - 1),
                ));
            } else {
                (status, body) = (416, &[]);
                headers.push(("Content-Range", format!("bytes */{total}")));
            }
        }
        write!(
            stream,
            "HTTP/1.1 {status} Scripted\r\nConnection: close\r\n"
        )?;
        if self.announce {
            write!(stream, "Content-Length: {}\r\n", body.len())?;
        }
        for (name, value) in headers {
            write!(stream, "{name}: {value}\r\n")?;
        }
        write!(stream, "\r\n")?;
        stream.write_all(&body[..body.len().min(self.sends)])?;
        stream.flush()?;
        sleep(self.then_waits);
        Ok(())
    }
}

/// Gives each request the next reply of its script; past its end it answers 599, which no test expects.
pub(crate) struct Server {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start(script: impl IntoIterator<Item = Reply>) -> Server {
        let mut script: VecDeque<Reply> = script.into_iter().collect();
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port on loopback");
        let address = listener.local_addr().expect("its address");
        let asked = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = spawn({
            let (asked, stop) = (Arc::clone(&asked), Arc::clone(&stop));
            move || {
                for stream in listener.incoming() {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let mut stream = stream.expect("a connection");
                    let Some(request) = read_request(&mut stream) else {
                        continue;
                    };
                    asked.lock().unwrap().push(request.clone());
                    let reply = script
                        .pop_front()
                        .unwrap_or_else(|| Reply::status(599, "the script has ended"));
                    let _ = reply.write(&request, &mut stream); // the client may hang up on a bad answer
                }
            }
        });
        Server {
            address,
            asked,
            stop,
            thread: Some(thread),
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn read_request(stream: &mut TcpStream) -> Option<Asked> {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).ok()?;
        bytes.push(byte[0]);
    }
    let text = String::from_utf8(bytes).ok()?;
    let mut lines = text.lines();
    let path = lines.next()?.split(' ').nth(1)?.to_owned();
    let headers = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .collect();
    Some(Asked { path, headers })
}
