//! Memory that connections share: taken from a stack of this thread, so that the next one gets what is still in the cache.

use std::cell::RefCell;

use culvert::sys::splice::Pipe;

thread_local! {
    static SLABS: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
    static PIPES: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

const KEPT: usize = 64;

/// A slab of `size` bytes; every caller of a process uses the same size.
pub(crate) fn take_slab(size: usize) -> Box<[u8]> {
    SLABS.with_borrow_mut(Vec::pop).filter(|slab| slab.len() == size).unwrap_or_else(|| vec![0; size].into_boxed_slice())
}

pub(crate) fn give_slab(slab: Box<[u8]>) {
    SLABS.with_borrow_mut(|slabs| {
        if slabs.len() < KEPT {
            slabs.push(slab);
        }
    });
}

pub(crate) fn take_pipe(size: usize) -> std::io::Result<Pipe> {
    PIPES.with_borrow_mut(Vec::pop).map_or_else(|| Pipe::open(size, 4096), Ok)
}

pub(crate) fn give_pipe(pipe: Pipe) {
    PIPES.with_borrow_mut(|pipes| {
        if pipe.bytes() == 0 && pipes.len() < KEPT {
            pipes.push(pipe);
        }
    });
}
