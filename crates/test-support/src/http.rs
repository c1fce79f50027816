//! A scripted HTTP server on 127.0.0.1 that misbehaves on demand and remembers what it was asked.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::Duration;

/// What a client asked for.
#[derive(Debug, Clone)]
pub struct Asked {
    /// The method: `GET` or `HEAD`.
    pub method: String,
    /// The path with its query.
    pub path: String,
    headers: Vec<(String, String)>,
}

impl Asked {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }
}

/// Longer than any test waits, so that what waits for ever in place of giving up fails.
const LONGEST_SILENCE: Duration = Duration::from_secs(60);

/// One answer, good or bad.
#[derive(Debug, Clone)]
pub struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    /// Answers `Range` requests from this body as a good server does.
    ranges: bool,
    announce: bool,
    body: Vec<u8>,
    /// How many bytes of the answer's body are sent before the connection closes.
    sends: usize,
    /// How long the server is silent after the bytes that it sends.
    then_waits: Duration,
    /// The silence also lasts until something comes here, or cannot come any more.
    until: Option<Arc<Mutex<Receiver<()>>>>,
}

impl Reply {
    /// A reply of this status and body, ranges not supported.
    pub fn status(status: u16, body: impl Into<Vec<u8>>) -> Reply {
        Reply {
            status,
            headers: Vec::new(),
            ranges: false,
            announce: true,
            body: body.into(),
            sends: usize::MAX,
            then_waits: Duration::ZERO,
            until: None,
        }
    }

    /// A reply of status 200 with this body, ranges not supported.
    pub fn body(body: &[u8]) -> Reply {
        Reply::status(200, body)
    }

    /// A reply of status 200 with this body, from a server that supports ranges.
    pub fn file(body: &[u8]) -> Reply {
        Reply {
            ranges: true,
            ..Reply::body(body)
        }
    }

    /// The reply with one more header.
    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Reply {
        self.headers.push((name, value.into()));
        self
    }

    /// The connection closes after these bytes of the body.
    pub fn dropped_after(self, sends: usize) -> Reply {
        Reply { sends, ..self }
    }

    /// The connection closes after these bytes of the body and a silence.
    pub fn stalled_after(self, sends: usize, then_waits: Duration) -> Reply {
        Reply {
            sends,
            then_waits,
            ..self
        }
    }

    /// The connection closes after these bytes of the body and a silence, which ends when `released` has something to
    /// receive, or its sender is gone, or after a minute.
    pub fn stalled_until(self, sends: usize, released: Receiver<()>) -> Reply {
        Reply {
            sends,
            until: Some(Arc::new(Mutex::new(released))),
            ..self
        }
    }

    /// The reply without Content-Length: the body ends with the connection.
    pub fn unannounced(self) -> Reply {
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
        if asked.method != "HEAD" {
            stream.write_all(&body[..body.len().min(self.sends)])?;
        }
        stream.flush()?;
        sleep(self.then_waits);
        if let Some(released) = self.until {
            let _ = released.lock().unwrap().recv_timeout(LONGEST_SILENCE);
        }
        Ok(())
    }
}

/// Gives each request the next reply of its script; past its end it answers 599, which no test expects.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens on a free port of 127.0.0.1.
    pub fn start(script: impl IntoIterator<Item = Reply>) -> Server {
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

    /// The server's address, without a `/` at the end.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// All requests so far.
    pub fn asked(&self) -> Vec<Asked> {
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
    let mut request = lines.next()?.split(' ').map(str::to_owned);
    let (method, path) = (request.next()?, request.next()?);
    let headers = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .collect();
    Some(Asked {
        method,
        path,
        headers,
    })
}
