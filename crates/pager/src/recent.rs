//! Chunks that were used a moment ago: what lies beside a page that was wanted is mostly wanted next.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use crate::far::Key;

/// How many bytes of them are kept.
const ROOM: usize = 4 << 20;

/// The chunks, the one that came first goes first.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    chunks: HashMap<Key, Arc<Vec<u8>>>,
    order: VecDeque<Key>,
    bytes: usize,
}

impl Recent {
    pub(crate) fn get(&self, key: Key) -> Option<Arc<Vec<u8>>> {
        self.chunks.get(&key).cloned()
    }

    pub(crate) fn put(&mut self, key: Key, raw: Arc<Vec<u8>>) {
        let bytes = raw.len();
        if self.chunks.insert(key, raw).is_some() {
            return;
        }
        self.bytes += bytes;
        self.order.push_back(key);
        while self.bytes > ROOM
            && let Some(oldest) = self.order.pop_front()
        {
            let gone = self.chunks.remove(&oldest);
            self.bytes -= gone.map_or(0, |raw| raw.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_bounded_and_the_newest() {
        let key = |chunk| Key { layer: 0, chunk };
        let mut recent = Recent::default();
        for chunk in 0..100 {
            recent.put(key(chunk), Arc::new(vec![0; 64 << 10]));
            recent.put(key(chunk), Arc::new(vec![0; 64 << 10]));
        }
        assert_eq!(recent.chunks.len(), 64);
        assert_eq!(recent.bytes, 4 << 20);
        assert!(recent.get(key(35)).is_none() && recent.get(key(36)).is_some());
    }
}
