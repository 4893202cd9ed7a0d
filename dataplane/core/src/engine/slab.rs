//! A vector with holes: stable small keys, no allocation per entry.

/// Values by key. A key is reused only after `remove`.
#[derive(Debug)]
pub struct Slab<T> {
    entries: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    pub fn new() -> Self {
        Slab { entries: Vec::new(), free: Vec::new() }
    }

    pub fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    pub fn insert(&mut self, value: T) -> u32 {
        match self.free.pop() {
            Some(key) => {
                self.entries[key as usize] = Some(value);
                key
            }
            None => {
                self.entries.push(Some(value));
                (self.entries.len() - 1) as u32
            }
        }
    }

    #[inline]
    pub fn get(&self, key: u32) -> Option<&T> {
        self.entries.get(key as usize).and_then(Option::as_ref)
    }

    #[inline]
    pub fn get_mut(&mut self, key: u32) -> Option<&mut T> {
        self.entries.get_mut(key as usize).and_then(Option::as_mut)
    }

    pub fn remove(&mut self, key: u32) -> Option<T> {
        let value = self.entries.get_mut(key as usize).and_then(Option::take)?;
        self.free.push(key);
        if self.free.len() == self.entries.len() && self.entries.len() > 4096 {
            // The last of a large crowd has left: give its memory back.
            self.entries = Vec::new();
            self.free = Vec::new();
        }
        Some(value)
    }

    pub fn keys(&self) -> Vec<u32> {
        (0..self.entries.len() as u32).filter(|key| self.entries[*key as usize].is_some()).collect()
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.entries.iter().enumerate().filter_map(|(key, value)| value.as_ref().map(|v| (key as u32, v)))
    }
}

impl<T> std::ops::Index<u32> for Slab<T> {
    type Output = T;
    /// # Panics
    /// If nothing has this key: the caller kept a key past `remove`.
    fn index(&self, key: u32) -> &T {
        self.get(key).expect("a live key")
    }
}

impl<T> std::ops::IndexMut<u32> for Slab<T> {
    fn index_mut(&mut self, key: u32) -> &mut T {
        self.get_mut(key).expect("a live key")
    }
}
