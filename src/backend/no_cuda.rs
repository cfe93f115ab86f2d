//! CUDA devices in a build without the feature `cuda`: none can be opened, so no value of these
//! types exists.

use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

use super::proximity::Connection;
use super::{Copied, Gathering, Order, Refuses, Unstarted};
use crate::abi::{PaArgs, PaBucket, PaChannel, PaSegment, PaStatus};
use crate::plan::Launch;

/// Threads of a block, as for `cuda`.
pub(crate) const THREADS: u32 = 256;

/// Reason why there is no embedded fatbin.
pub(crate) fn fatbin() -> Result<&'static [u8], &'static str> {
    Err("param-averager was built without its feature `cuda`")
}

/// Declares a type without values; its methods can't be called.
macro_rules! absent {
    ($type:ident {
        $(fn $name:ident$(<$a:lifetime>)?($($argument:ident: $of:ty),*) $(-> $result:ty)?;)*
    }) => {
        #[derive(Debug)]
        pub(crate) enum $type {}

        #[allow(unused_variables)]
        impl $type {
            $(pub(crate) fn $name$(<$a>)?(&self $(, $argument: $of)*) $(-> $result)? {
                match *self {}
            })*
        }
    };
}

absent!(Context {
    fn usable_blocks() -> u32;
    fn has_stream_waits() -> bool;
    fn has_mps() -> bool;
    fn ordinal() -> usize;
    fn owns(address: u64) -> bool;
    fn lends(address: u64, readers: &[usize], shared: &mut u64) -> bool;
});

impl Context {
    pub(crate) unsafe fn read_behind_all(&self, _: u64, _: &mut [u8]) -> Result<(), Failed> {
        match *self {}
    }

    pub(crate) fn open(_: usize) -> Result<Arc<Context>, String> {
        Err("this build has no CUDA: build param-averager with its feature `cuda`, or use \
             Device::cpu()"
            .into())
    }
}

absent!(Failed {
    fn is_of_capture() -> bool;
});

impl From<Failed> for String {
    fn from(failed: Failed) -> String {
        match failed {}
    }
}

absent!(DeviceMemory {
    fn address() -> u64;
    fn bytes() -> usize;
    fn write(offset: usize, from: &[u8]) -> Result<(), Failed>;
    fn read(to: &mut [u8]) -> Result<(), Failed>;
    fn fill(offset: usize, bytes: usize, value: u8) -> Result<(), Failed>;
});

impl DeviceMemory {
    pub(crate) fn new(context: &Arc<Context>, _: usize) -> Result<Self, Failed> {
        match **context {}
    }
}

absent!(Pinned {
    fn address() -> u64;
    fn size() -> usize;
});

impl Pinned {
    pub(crate) fn new(context: &Arc<Context>, _: usize) -> Result<Self, Failed> {
        match **context {}
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        match *self {}
    }
}

absent!(Part {});

/// Result of a launch.
pub(crate) type Launched = Option<Result<Part, Failed>>;

absent!(Rank {
    fn bytes() -> usize;
    fn channels() -> u64;
    fn status() -> u64;
    fn buckets() -> u64;
    fn segments(buckets: usize, before: usize) -> u64;
    fn ended() -> &[PaStatus];
    fn was_captured() -> bool;
    fn longest_wait() -> Duration;
    fn is_done() -> bool;
    fn finish() -> Result<(), Failed>;
    fn prepare_for_stage(copied: Option<&[Copied]>) -> Result<(), Failed>;
});

absent!(StageStream {
    fn device() -> usize;
    fn put() -> Result<(), Failed>;
    fn on_host(address: u64) -> u64;
    fn raw() -> *mut c_void;
});

impl StageStream {
    pub(crate) unsafe fn read(&self, _: u64, _: &mut [u8]) -> Result<(), Failed> {
        match *self {}
    }

    pub(crate) fn fetch(&mut self, _: bool) -> Result<(), Failed> {
        match *self {}
    }
}

impl Rank {
    pub(crate) fn new(
        context: &Arc<Context>,
        _: &[PaChannel],
        _: usize,
        _: usize,
        _: bool,
    ) -> Result<Rank, String> {
        match **context {}
    }

    pub(crate) fn set_tables<'a>(
        &mut self,
        _: &'a [PaBucket],
        _: impl Iterator<Item = &'a [PaSegment]>,
    ) {
        match *self {}
    }

    pub(crate) unsafe fn start(
        &mut self,
        _: &PaArgs,
        _: &[Launch],
        _: Order,
        _: &Gathering<'_>,
        _: Option<(&[Launch], &mut Refuses<'_>)>,
    ) -> Result<(), Unstarted> {
        match *self {}
    }

    pub(crate) unsafe fn run_local(
        &mut self,
        _: &PaArgs,
        _: u32,
        _: Order,
    ) -> Result<(), Unstarted> {
        match *self {}
    }

    pub(crate) unsafe fn wait_for(&self, _: *mut c_void) -> Result<(), Unstarted> {
        match *self {}
    }

    pub(crate) unsafe fn is_capturing(&self, _: *mut c_void) -> Result<bool, Failed> {
        match *self {}
    }
}

pub(crate) fn connection(one: &Context, _: &Context) -> Result<Connection, Failed> {
    match *one {}
}

pub(crate) mod peer {
    use super::{Arc, Context, Failed};
    use crate::backend::proximity::PeerAccess;

    #[cfg(processes)]
    pub(crate) fn is_allowed() -> bool {
        true
    }

    pub(crate) fn access(one: &Arc<Context>, _: &Arc<Context>) -> Result<PeerAccess, Failed> {
        match **one {}
    }

    pub(crate) fn is_direct(one: &Arc<Context>, _: &Arc<Context>) -> Result<bool, Failed> {
        match **one {}
    }
}

#[cfg(processes)]
pub(crate) use processes::{identity, IpcImport, IpcPeer, IpcProbe, Registered, Round};

#[cfg(processes)]
mod processes {
    use std::os::fd::{BorrowedFd, OwnedFd};

    use super::{Arc, Context, DeviceMemory, Failed};
    use crate::backend::proximity::Identity;
    use crate::backend::{Memfd, MemoryHandle};

    pub(crate) fn identity(context: &Context) -> Result<Identity, String> {
        match *context {}
    }

    impl DeviceMemory {
        pub(crate) fn exportable(context: &Arc<Context>, _: usize) -> Result<Self, String> {
            match **context {}
        }

        pub(crate) fn export_handle(&self) -> Option<(Vec<u8>, BorrowedFd<'_>)> {
            match *self {}
        }
    }

    absent!(Registered {
        fn address() -> u64;
        fn memfd() -> &Memfd;
        fn wait_for_device() -> Result<(), Failed>;
    });

    impl Registered {
        pub(crate) fn new(context: &Arc<Context>, _: Memfd) -> Result<Self, Failed> {
            match **context {}
        }

        pub(crate) fn memfd_mut(&mut self) -> &mut Memfd {
            match *self {}
        }
    }

    absent!(IpcImport {
        fn address() -> u64;
        fn bytes() -> usize;
    });

    impl IpcImport {
        pub(crate) fn open(
            context: &Arc<Context>,
            _: &[u8],
            _: OwnedFd,
            _: usize,
        ) -> Result<Self, String> {
            match **context {}
        }
    }

    absent!(IpcPeer {});

    absent!(IpcProbe {
        fn export() -> (MemoryHandle, BorrowedFd<'_>);
    });

    #[derive(Clone, Copy)]
    pub(crate) struct Round;

    impl Round {
        pub(crate) fn all() -> [[Round; 2]; 0] {
            []
        }
    }

    #[derive(Clone, Copy)]
    pub(crate) struct Outcome {
        pub(crate) is_right: bool,
        pub(crate) is_quick: bool,
    }

    impl IpcProbe {
        pub(crate) fn new(context: &Arc<Context>) -> Result<IpcProbe, String> {
            match **context {}
        }

        pub(crate) fn open(&self, _: &MemoryHandle, _: OwnedFd) -> Result<IpcPeer, String> {
            match *self {}
        }

        pub(crate) fn has_room(&self, _: &IpcPeer, _: Round) -> bool {
            match *self {}
        }

        pub(crate) fn clear(&mut self) -> Result<(), String> {
            match *self {}
        }

        pub(crate) fn run(&self, _: &IpcPeer, _: Round, _: bool) -> Result<Outcome, String> {
            match *self {}
        }
    }
}
