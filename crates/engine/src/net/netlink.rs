//! Requests to the kernel and its answers, one socket after the other, without a runtime: a request takes microseconds.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable,
};
use netlink_sys::{Socket as RawSocket, SocketAddr};

/// A request, and what is said about it: flags beside `NLM_F_REQUEST`.
pub(crate) struct Request<M> {
    pub(crate) message: M,
    pub(crate) flags: u16,
}

/// A socket. It belongs to the network namespace in which it was opened, wherever its user goes.
pub(crate) struct Socket {
    raw: RawSocket,
    sequence: u32,
}

impl Socket {
    pub(crate) fn open(protocol: isize) -> io::Result<Socket> {
        let mut raw = RawSocket::new(protocol)?;
        raw.bind_auto()?;
        raw.connect(&SocketAddr::new(0, 0))?;
        // An error without the request that it is about, which may be larger than a buffer.
        raw.set_cap_ack(true)?;
        Ok(Socket { raw, sequence: 0 })
    }

    /// Sends requests together, and waits until the kernel has answered the last one that asks for an acknowledgement.
    /// It answers in their order, and refuses unasked. Fails with the place of the first that it refused, if it was one.
    pub(crate) fn send<M: NetlinkSerializable>(
        &mut self,
        requests: Vec<Request<M>>,
    ) -> Result<(), (Option<usize>, io::Error)> {
        let first = self.sequence;
        let asks = |request: &Request<M>| request.flags & NLM_F_ACK != 0;
        let last = requests.iter().rposition(asks);
        // The beginning of a batch: if that is refused, all of it is, and nothing else is answered.
        let batch = !requests.first().is_some_and(asks);
        let mut bytes = Vec::new();
        for request in requests {
            self.write(request, &mut bytes);
        }
        let alone = |e| (None, e);
        self.raw.send(&bytes, 0).map_err(alone)?;
        let mut refusal = None;
        loop {
            for (sequence, error) in self.answers().map_err(alone)? {
                let at = usize::try_from(sequence.wrapping_sub(first)).ok();
                let over = at == last || (batch && at == Some(0));
                if let Some(error) = error {
                    refusal.get_or_insert((at, error));
                }
                if over {
                    return refusal.map_or(Ok(()), Err);
                }
            }
        }
    }

    /// Asks for all things of a kind.
    pub(crate) fn dump<M>(&mut self, request: Request<M>) -> io::Result<Vec<M>>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        let mut bytes = Vec::new();
        self.write(request, &mut bytes);
        self.raw.send(&bytes, 0)?;
        let mut found = Vec::new();
        loop {
            let (answer, _) = self.raw.recv_from_full()?;
            let mut rest = &answer[..];
            while !rest.is_empty() {
                let message = NetlinkMessage::<M>::deserialize(rest).map_err(io::Error::other)?;
                rest = after(rest, &message.header);
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(found),
                    NetlinkPayload::Error(e) if e.code.is_some() => return Err(e.to_io()),
                    NetlinkPayload::InnerMessage(one) => found.push(one),
                    _ => {}
                }
            }
        }
    }

    fn write<M: NetlinkSerializable>(&mut self, request: Request<M>, bytes: &mut Vec<u8>) {
        let mut header = NetlinkHeader::default();
        header.flags = request.flags | NLM_F_REQUEST;
        header.sequence_number = self.sequence;
        self.sequence = self.sequence.wrapping_add(1);
        let mut message =
            NetlinkMessage::new(header, NetlinkPayload::InnerMessage(request.message));
        message.finalize();
        let at = bytes.len();
        // Each begins at a multiple of 4.
        bytes.resize(at + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut bytes[at..]);
    }

    /// The acknowledgements and errors in one datagram of the kernel.
    fn answers(&self) -> io::Result<Vec<(u32, Option<io::Error>)>> {
        let (answer, _) = self.raw.recv_from_full()?;
        let mut found = Vec::new();
        let mut rest = &answer[..];
        while !rest.is_empty() {
            let message =
                NetlinkMessage::<NoMessage>::deserialize(rest).map_err(io::Error::other)?;
            rest = after(rest, &message.header);
            if let NetlinkPayload::Error(e) = message.payload {
                let error = e.code.is_some().then(|| e.to_io());
                found.push((message.header.sequence_number, error));
            }
        }
        Ok(found)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.raw.as_fd()
    }
}

fn after<'a>(bytes: &'a [u8], header: &NetlinkHeader) -> &'a [u8] {
    let length = usize::try_from(header.length).unwrap_or(usize::MAX);
    bytes.get(length.next_multiple_of(4)..).unwrap_or_default()
}

/// What is read where only acknowledgements and errors are waited for.
#[derive(Debug)]
struct NoMessage;

impl NetlinkDeserializable for NoMessage {
    type Error = netlink_packet_core::DecodeError;

    fn deserialize(_: &NetlinkHeader, _: &[u8]) -> Result<Self, Self::Error> {
        Ok(NoMessage)
    }
}
