//! Network interfaces.

use super::RateLimiter;

body! {
    /// A network interface on a TAP device of the host.
    pub struct NetworkInterface {
        /// Its name in the API, `[A-Za-z0-9_]+`.
        iface_id: String,
        /// The TAP device.
        host_dev_name: String,
    }
    optional {
        /// The guest's MAC address, `06:00:ac:10:00:02`.
        guest_mac: String [into],
        /// The MTU to tell the guest, 68 to 65,535 bytes. Firecracker ≥ 1.16.
        mtu: u16 [since Mtu],
        /// Limits on what the guest receives.
        rx_rate_limiter: RateLimiter,
        /// Limits on what the guest sends.
        tx_rate_limiter: RateLimiter,
    }
}

impl NetworkInterface {
    /// The interface `iface_id` on the TAP device `host_dev_name`.
    pub fn new(iface_id: impl Into<String>, host_dev_name: impl Into<String>) -> NetworkInterface {
        NetworkInterface {
            iface_id: iface_id.into(),
            host_dev_name: host_dev_name.into(),
            guest_mac: None,
            mtu: None,
            rx_rate_limiter: None,
            tx_rate_limiter: None,
        }
    }
}

body! {
    /// Other limits for an interface of a running guest; a bucket that is not given stays as it is.
    pub struct PartialNetworkInterface {
        /// The interface's name in the API.
        iface_id: String,
    }
    optional {
        /// Limits on what the guest receives.
        rx_rate_limiter: RateLimiter,
        /// Limits on what the guest sends.
        tx_rate_limiter: RateLimiter,
    }
}

impl PartialNetworkInterface {
    /// Changes the interface of this name.
    pub fn new(iface_id: impl Into<String>) -> PartialNetworkInterface {
        PartialNetworkInterface {
            iface_id: iface_id.into(),
            rx_rate_limiter: None,
            tx_rate_limiter: None,
        }
    }
}
