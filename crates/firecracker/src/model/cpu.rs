//! What of the host's CPU the guest sees.

use serde::{Deserialize, Serialize};

/// A ready-made CPU template. Deprecated since Firecracker 1.5 in favour of [`CpuConfig`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum CpuTemplate {
    /// Intel, as the C3 instances have it.
    C3,
    /// Intel, as the T2 instances have it.
    T2,
    /// Intel, T2 for fleets of several models.
    T2S,
    /// Intel, T2 from Cascade Lake on.
    T2CL,
    /// AMD, near to T2CL.
    T2A,
    /// Arm Neoverse V1 as N1.
    V1N1,
    /// The host's CPU as it is.
    None,
}

body! {
    /// Changes to what the guest sees of its CPU. Firecracker ≥ 1.4.
    ///
    /// A bitmap is text: `0b`, then a `0`, `1` or `x` (leave as it is) a bit.
    #[derive(Default, Eq)]
    pub struct CpuConfig {}
    optional {
        /// KVM capabilities to check besides (`"121"`) or not to check (`"!121"`).
        kvm_capabilities: Vec<String>,
        /// Changes to CPUID (x86-64).
        cpuid_modifiers: Vec<CpuidLeafModifier>,
        /// Changes to model specific registers (x86-64).
        msr_modifiers: Vec<MsrModifier>,
        /// Changes to registers (aarch64).
        reg_modifiers: Vec<ArmRegisterModifier>,
        /// Changes to the features of virtual CPUs (aarch64).
        vcpu_features: Vec<VcpuFeatures>,
    }
}

/// Changes to one leaf of CPUID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct CpuidLeafModifier {
    /// The leaf, as hexadecimal, decimal or binary text.
    pub leaf: String,
    /// The leaf below it, in the same way.
    pub subleaf: String,
    /// KVM's flags for this leaf.
    pub flags: u32,
    /// The changes.
    pub modifiers: Vec<CpuidRegisterModifier>,
}

impl CpuidLeafModifier {
    /// Changes registers of `leaf` and `subleaf`.
    pub fn new(
        leaf: impl Into<String>,
        subleaf: impl Into<String>,
        flags: u32,
        modifiers: Vec<CpuidRegisterModifier>,
    ) -> CpuidLeafModifier {
        CpuidLeafModifier {
            leaf: leaf.into(),
            subleaf: subleaf.into(),
            flags,
            modifiers,
        }
    }
}

/// One of CPUID's result registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum CpuidRegister {
    /// `eax`
    Eax,
    /// `ebx`
    Ebx,
    /// `ecx`
    Ecx,
    /// `edx`
    Edx,
}

/// A change to one register of a CPUID leaf.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct CpuidRegisterModifier {
    /// The register.
    pub register: CpuidRegister,
    /// Its bitmap, 32 bits.
    pub bitmap: String,
}

impl CpuidRegisterModifier {
    /// Applies `bitmap` to `register`.
    pub fn new(register: CpuidRegister, bitmap: impl Into<String>) -> CpuidRegisterModifier {
        CpuidRegisterModifier {
            register,
            bitmap: bitmap.into(),
        }
    }
}

/// A change to a model specific register.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MsrModifier {
    /// The register's address, as hexadecimal, decimal or binary text.
    pub addr: String,
    /// Its bitmap, 64 bits.
    pub bitmap: String,
}

impl MsrModifier {
    /// Applies `bitmap` to the register at `addr`.
    pub fn new(addr: impl Into<String>, bitmap: impl Into<String>) -> MsrModifier {
        MsrModifier {
            addr: addr.into(),
            bitmap: bitmap.into(),
        }
    }
}

/// A change to an Arm register.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ArmRegisterModifier {
    /// KVM's id of the register, as hexadecimal, decimal or binary text.
    pub addr: String,
    /// Its bitmap, up to 128 bits.
    pub bitmap: String,
}

impl ArmRegisterModifier {
    /// Applies `bitmap` to the register at `addr`.
    pub fn new(addr: impl Into<String>, bitmap: impl Into<String>) -> ArmRegisterModifier {
        ArmRegisterModifier {
            addr: addr.into(),
            bitmap: bitmap.into(),
        }
    }
}

/// A change to one word of a virtual CPU's features.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct VcpuFeatures {
    /// Which word.
    pub index: u32,
    /// Its bitmap, 32 bits.
    pub bitmap: String,
}

impl VcpuFeatures {
    /// Applies `bitmap` to word `index`.
    pub fn new(index: u32, bitmap: impl Into<String>) -> VcpuFeatures {
        VcpuFeatures {
            index,
            bitmap: bitmap.into(),
        }
    }
}
