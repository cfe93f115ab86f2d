//! Facts about a CUDA device, and the connection between two.

use std::ffi::{c_char, c_int, CStr};

#[cfg(processes)]
use super::driver;
use super::driver::{call, Failed};
use super::Context;
#[cfg(processes)]
use crate::backend::proximity::Identity;
use crate::backend::proximity::{Connection, Slot};
use cudarc::driver::sys::{
    self, CUdevice_P2PAttribute as P2pAttribute, CUdevice_attribute as Attribute,
};

/// A CUDA device of this process.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CudaDevice {
    /// Index of the device, as [`Device::cuda`](crate::Device::cuda) takes it.
    pub ordinal: usize,
    /// Model name, such as "NVIDIA H200".
    pub name: String,
    /// Compute capability, as (major, minor).
    pub compute_capability: (u32, u32),
    /// Total device memory in bytes.
    pub memory: u64,
    /// Number of streaming multiprocessors.
    pub multiprocessors: u32,
    /// PCI address as domain, bus, device and function, such as `0000:41:00.0`.
    pub pci: String,
    /// Nearest NUMA node of the host, if the system reports one.
    pub numa_node: Option<u32>,
    /// PCI path from the host to the device: host bridge, PCIe bridges, device. Empty if unknown.
    path: Vec<String>,
}

/// Properties of a device, from the driver and the system.
pub(crate) fn facts(context: &Context) -> Result<CudaDevice, Failed> {
    const LONGEST: usize = 256;
    let (device, mut bytes) = (context.device(), 0);
    let (mut name, mut pci) = ([0 as c_char; LONGEST], [0 as c_char; LONGEST]);
    // SAFETY: a device of this driver, and buffers of the given lengths; the driver terminates its
    // strings with a zero.
    let [name, pci] = unsafe {
        call!(cuDeviceTotalMem_v2(&mut bytes, device))?;
        call!(cuDeviceGetName(name.as_mut_ptr(), LONGEST as c_int, device))?;
        call!(cuDeviceGetPCIBusId(pci.as_mut_ptr(), LONGEST as c_int, device))?;
        [name, pci].map(|text| CStr::from_ptr(text.as_ptr()).to_string_lossy().into_owned())
    };
    let number = |attribute| Ok::<u32, Failed>(context.attribute(attribute)?.max(0) as u32);
    let pci = pci.to_lowercase(); // spelled as in /sys
    let (path, numa_node) = in_the_system(&pci);
    Ok(CudaDevice {
        ordinal: context.ordinal(),
        name,
        compute_capability: (
            number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        memory: bytes as u64,
        multiprocessors: number(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        pci,
        numa_node,
        path,
    })
}

/// PCI path and NUMA node of a device, as Linux reports them. Empty on other systems and for
/// unknown devices.
fn in_the_system(pci: &str) -> (Vec<String>, Option<u32>) {
    let folder = std::path::Path::new("/sys/bus/pci/devices").join(pci);
    let whole = std::fs::canonicalize(&folder).unwrap_or_default();
    // /sys/devices/pci0000:40/0000:40:01.1/0000:41:00.0
    let parts = whole.iter().map(|part| part.to_string_lossy().into_owned());
    let path = parts.skip_while(|part| !part.starts_with("pci")).collect();
    let node = std::fs::read_to_string(folder.join("numa_node")).ok();
    (path, node.and_then(|text| text.trim().parse().ok())) // -1 stands for none
}

/// Connection between two devices of this process.
pub(crate) fn connection(one: &Context, other: &Context) -> Result<Connection, Failed> {
    if one.ordinal() != other.ordinal() && joined(one.device(), other.device())? {
        return Ok(Connection::NvLink);
    }
    Ok(facts(one)?.slot().connection(&facts(other)?.slot()))
}

/// True if native atomics work between two devices in both directions.
fn joined(one: sys::CUdevice, other: sys::CUdevice) -> Result<bool, Failed> {
    let attribute = P2pAttribute::CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED;
    let (mut there, mut back) = (0, 0);
    // SAFETY: two devices of this driver.
    unsafe {
        call!(cuDeviceGetP2PAttribute(&mut there, attribute, one, other))?;
        call!(cuDeviceGetP2PAttribute(&mut back, attribute, other, one))?;
    }
    Ok(there != 0 && back != 0)
}

impl CudaDevice {
    fn slot(&self) -> Slot {
        Slot { pci: self.pci.clone(), numa_node: self.numa_node, path: self.path.clone() }
    }
}

/// Identity of the device of a context.
#[cfg(processes)]
pub(crate) fn identity(context: &Context) -> Result<Identity, String> {
    let own = context.device();
    let mut others = vec![];
    for ordinal in 0..driver::get()?.devices {
        let mut other = 0;
        // SAFETY: a device of this driver.
        unsafe { call!(cuDeviceGet(&mut other, ordinal as c_int)) }?;
        if other != own && joined(own, other)? {
            others.push(uuid(other)?);
        }
    }
    Ok(Identity { uuid: uuid(own)?, slot: facts(context)?.slot(), joined: others })
}

#[cfg(processes)]
fn uuid(device: sys::CUdevice) -> Result<String, Failed> {
    let mut uuid = sys::CUuuid_st { bytes: [0; 16] };
    // SAFETY: a device of this driver.
    unsafe { call!(cuDeviceGetUuid_v2(&mut uuid, device)) }?;
    Ok(uuid.bytes.iter().map(|byte| format!("{:02x}", *byte as u8)).collect())
}
