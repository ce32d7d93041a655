//! One method for each endpoint, in the order of Firecracker's own description.

use hyper::Method;
use serde::Serialize;

use super::{CallError, Client};
use crate::model::{
    ActionType, Balloon, BalloonHintingStatus, BalloonStartCmd, BalloonStats, BalloonStatsUpdate,
    BalloonUpdate, BootSource, CpuConfig, Drive, EntropyDevice, FirecrackerVersion,
    FullVmConfiguration, InstanceActionInfo, InstanceInfo, Logger, MachineConfiguration,
    MachineConfigurationUpdate, MemoryHotplugConfig, MemoryHotplugSizeUpdate, MemoryHotplugStatus,
    Metrics, MmdsConfig, MmdsContentsObject, NetworkInterface, PartialDrive,
    PartialNetworkInterface, PartialPmem, Pmem, SerialDevice, SnapshotCreateParams,
    SnapshotLoadParams, Uses, Vm, VmState, Vsock,
};
use crate::version::{Feature, Version};

/// A body that itself uses nothing newer than the baseline.
#[derive(Serialize)]
#[serde(transparent)]
struct Plain<'a, T>(&'a T);

impl<T> Uses for Plain<'_, T> {
    fn uses(&self, _: &mut dyn FnMut(Feature)) {}
}

/// `/collection/id`, if the id stays within its place.
fn path_of(method: &Method, collection: &'static str, id: &str) -> Result<String, CallError> {
    let stays = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b'?' | b'#' | b'%');
    if id.is_empty() || id == "." || id == ".." || !id.bytes().all(stays) {
        return Err(CallError::BadId {
            method: method.clone(),
            collection,
            id: id.chars().take(64).collect(),
        });
    }
    Ok(format!("{collection}/{id}"))
}

/// Firecracker itself.
impl Client {
    /// `GET /`: who it is, and where the guest stands.
    pub async fn describe(&self) -> Result<InstanceInfo, CallError> {
        self.get("/").await
    }

    /// `GET /version`: its version, remembered from then on.
    pub async fn version(&self) -> Result<Version, CallError> {
        let path = "/version";
        let answer: FirecrackerVersion = self.get(path).await?;
        let version =
            answer
                .firecracker_version
                .parse()
                .map_err(|source| CallError::NoVersion {
                    method: Method::GET,
                    path: path.to_owned(),
                    source,
                })?;
        Ok(*self.version.get_or_init(|| version))
    }

    /// `GET /vm/config`: all that it was told.
    pub async fn vm_config(&self) -> Result<FullVmConfiguration, CallError> {
        self.get("/vm/config").await
    }

    /// `PUT /logger`: where its log goes. Before the guest starts; may be repeated.
    pub async fn put_logger(&self, logger: &Logger) -> Result<(), CallError> {
        self.tell(Method::PUT, "/logger".to_owned(), logger).await
    }

    /// `PUT /metrics`: where its metrics go. Before the guest starts; once.
    pub async fn put_metrics(&self, metrics: &Metrics) -> Result<(), CallError> {
        self.tell(Method::PUT, "/metrics".to_owned(), metrics).await
    }

    /// `PUT /actions`: does something at once; see [`Client::start`], [`Client::flush_metrics`] and
    /// [`Client::send_ctrl_alt_del`].
    pub async fn put_action(&self, action: &InstanceActionInfo) -> Result<(), CallError> {
        self.tell(Method::PUT, "/actions".to_owned(), action).await
    }

    /// `PUT /actions` `FlushMetrics`: writes a line of metrics now. After the guest started.
    pub async fn flush_metrics(&self) -> Result<(), CallError> {
        self.put_action(&InstanceActionInfo::new(ActionType::FlushMetrics))
            .await
    }
}

/// The guest's life.
impl Client {
    /// `PUT /actions` `InstanceStart`: starts the guest. Firecracker reads kernel and initrd now, so how long that takes is
    /// the disk's affair, and it has the deadline of snapshots.
    pub async fn start(&self) -> Result<(), CallError> {
        let start = InstanceActionInfo::new(ActionType::InstanceStart);
        let path = "/actions".to_owned();
        self.tell_within(self.snapshot_deadline, Method::PUT, path, &start)
            .await
    }

    /// `PUT /actions` `SendCtrlAltDel`: asks the guest to shut down (x86-64).
    pub async fn send_ctrl_alt_del(&self) -> Result<(), CallError> {
        self.put_action(&InstanceActionInfo::new(ActionType::SendCtrlAltDel))
            .await
    }

    /// `PATCH /vm`: see [`Client::pause`] and [`Client::resume`].
    pub async fn patch_vm(&self, vm: &Vm) -> Result<(), CallError> {
        self.tell(Method::PATCH, "/vm".to_owned(), vm).await
    }

    /// `PATCH /vm` `Paused`: the guest stands still. Pausing a paused guest succeeds.
    pub async fn pause(&self) -> Result<(), CallError> {
        self.patch_vm(&Vm::new(VmState::Paused)).await
    }

    /// `PATCH /vm` `Resumed`: the guest goes on. Resuming a running guest succeeds.
    pub async fn resume(&self) -> Result<(), CallError> {
        self.patch_vm(&Vm::new(VmState::Resumed)).await
    }

    /// `PUT /snapshot/create`: writes a paused guest's state and memory. Takes its own deadline.
    pub async fn create_snapshot(&self, create: &SnapshotCreateParams) -> Result<(), CallError> {
        let path = "/snapshot/create".to_owned();
        self.tell_within(self.snapshot_deadline, Method::PUT, path, create)
            .await
    }

    /// `PUT /snapshot/load`: starts from a snapshot, in a Firecracker that was told nothing but where log,
    /// metrics and serial console go. Takes its own deadline. When Firecracker refuses after it began to
    /// load, it exits.
    ///
    /// `track_dirty_pages` is sent as `enable_diff_snapshots` to a Firecracker below 1.13.
    pub async fn load_snapshot(&self, load: &SnapshotLoadParams) -> Result<(), CallError> {
        let older = match load.track_dirty_pages {
            None => None,
            Some(_) => {
                let found = self.learn_version().await?;
                (!found.has(Feature::TrackDirtyPagesOnLoad)).then(|| load.in_older_words())
            }
        };
        let load = older.as_ref().unwrap_or(load);
        let path = "/snapshot/load".to_owned();
        self.tell_within(self.snapshot_deadline, Method::PUT, path, load)
            .await
    }
}

/// What the guest is made of.
impl Client {
    /// `PUT /boot-source`: what it boots from.
    pub async fn put_boot_source(&self, boot: &BootSource) -> Result<(), CallError> {
        self.tell(Method::PUT, "/boot-source".to_owned(), boot)
            .await
    }

    /// `GET /machine-config`: CPUs and memory.
    pub async fn machine_config(&self) -> Result<MachineConfiguration, CallError> {
        self.get("/machine-config").await
    }

    /// `PUT /machine-config`: CPUs and memory.
    pub async fn put_machine_config(
        &self,
        machine: &MachineConfiguration,
    ) -> Result<(), CallError> {
        self.tell(Method::PUT, "/machine-config".to_owned(), machine)
            .await
    }

    /// `PATCH /machine-config`: some of CPUs and memory, before the guest starts.
    pub async fn patch_machine_config(
        &self,
        update: &MachineConfigurationUpdate,
    ) -> Result<(), CallError> {
        self.tell(Method::PATCH, "/machine-config".to_owned(), update)
            .await
    }

    /// `PUT /cpu-config`: what the guest sees of its CPU.
    pub async fn put_cpu_config(&self, cpu: &CpuConfig) -> Result<(), CallError> {
        self.tell(Method::PUT, "/cpu-config".to_owned(), cpu).await
    }

    /// `PUT /drives/{id}`: a block device. Before the guest starts; also after, with PCI, in Firecracker ≥
    /// 1.16 (developer preview).
    pub async fn put_drive(&self, drive: &Drive) -> Result<(), CallError> {
        let path = path_of(&Method::PUT, "/drives", &drive.drive_id)?;
        self.tell(Method::PUT, path, drive).await
    }

    /// `PATCH /drives/{id}`: another file or other limits, while the guest runs.
    pub async fn patch_drive(&self, drive: &PartialDrive) -> Result<(), CallError> {
        let path = path_of(&Method::PATCH, "/drives", &drive.drive_id)?;
        self.tell(Method::PATCH, path, drive).await
    }

    /// `DELETE /drives/{id}`: takes a block device away from a running guest, with PCI; not the root
    /// device. Firecracker ≥ 1.16 (developer preview).
    pub async fn delete_drive(&self, drive_id: &str) -> Result<(), CallError> {
        self.unplug("/drives", drive_id).await
    }

    /// `PUT /pmem/{id}`: a persistent memory device. Firecracker ≥ 1.14; after the guest started as
    /// [`Client::put_drive`].
    pub async fn put_pmem(&self, pmem: &Pmem) -> Result<(), CallError> {
        let path = path_of(&Method::PUT, "/pmem", &pmem.id)?;
        self.require(Feature::Pmem, &Method::PUT, &path).await?;
        self.tell(Method::PUT, path, pmem).await
    }

    /// `PATCH /pmem/{id}`: other limits, while the guest runs. Firecracker ≥ 1.16.
    pub async fn patch_pmem(&self, pmem: &PartialPmem) -> Result<(), CallError> {
        let path = path_of(&Method::PATCH, "/pmem", &pmem.id)?;
        self.require(Feature::PatchPmem, &Method::PATCH, &path)
            .await?;
        self.tell(Method::PATCH, path, pmem).await
    }

    /// `DELETE /pmem/{id}`: as [`Client::delete_drive`].
    pub async fn delete_pmem(&self, id: &str) -> Result<(), CallError> {
        self.unplug("/pmem", id).await
    }

    /// `PUT /network-interfaces/{id}`: a network interface; after the guest started as
    /// [`Client::put_drive`].
    pub async fn put_network_interface(
        &self,
        interface: &NetworkInterface,
    ) -> Result<(), CallError> {
        let path = path_of(&Method::PUT, "/network-interfaces", &interface.iface_id)?;
        self.tell(Method::PUT, path, interface).await
    }

    /// `PATCH /network-interfaces/{id}`: other limits, while the guest runs.
    pub async fn patch_network_interface(
        &self,
        interface: &PartialNetworkInterface,
    ) -> Result<(), CallError> {
        let path = path_of(&Method::PATCH, "/network-interfaces", &interface.iface_id)?;
        self.tell(Method::PATCH, path, interface).await
    }

    /// `DELETE /network-interfaces/{id}`: as [`Client::delete_drive`].
    pub async fn delete_network_interface(&self, iface_id: &str) -> Result<(), CallError> {
        self.unplug("/network-interfaces", iface_id).await
    }

    /// `PUT /vsock`: sockets between host and guest.
    pub async fn put_vsock(&self, vsock: &Vsock) -> Result<(), CallError> {
        self.tell(Method::PUT, "/vsock".to_owned(), vsock).await
    }

    /// `PUT /entropy`: random numbers from the host.
    pub async fn put_entropy(&self, entropy: &EntropyDevice) -> Result<(), CallError> {
        self.tell(Method::PUT, "/entropy".to_owned(), entropy).await
    }

    /// `PUT /serial`: where the serial console's output goes. Firecracker ≥ 1.14.
    pub async fn put_serial(&self, serial: &SerialDevice) -> Result<(), CallError> {
        self.require(Feature::Serial, &Method::PUT, "/serial")
            .await?;
        self.tell(Method::PUT, "/serial".to_owned(), serial).await
    }

    async fn unplug(&self, collection: &'static str, id: &str) -> Result<(), CallError> {
        let path = path_of(&Method::DELETE, collection, id)?;
        self.require(Feature::Unplug, &Method::DELETE, &path)
            .await?;
        self.ask(Method::DELETE, path).await
    }
}

/// The metadata service.
impl Client {
    /// `PUT /mmds/config`: how the guest reaches it.
    pub async fn put_mmds_config(&self, config: &MmdsConfig) -> Result<(), CallError> {
        self.tell(Method::PUT, "/mmds/config".to_owned(), config)
            .await
    }

    /// `GET /mmds`: what is in it.
    pub async fn mmds(&self) -> Result<MmdsContentsObject, CallError> {
        self.get("/mmds").await
    }

    /// `PUT /mmds`: puts this in it, and nothing else.
    pub async fn put_mmds(&self, contents: &MmdsContentsObject) -> Result<(), CallError> {
        self.tell(Method::PUT, "/mmds".to_owned(), &Plain(contents))
            .await
    }

    /// `PATCH /mmds`: changes what is in it, by the rules of JSON merge patch.
    pub async fn patch_mmds(&self, changes: &MmdsContentsObject) -> Result<(), CallError> {
        self.tell(Method::PATCH, "/mmds".to_owned(), &Plain(changes))
            .await
    }
}

/// Memory that comes and goes.
impl Client {
    /// `GET /balloon`: the balloon as it was told to be.
    pub async fn balloon(&self) -> Result<Balloon, CallError> {
        self.get("/balloon").await
    }

    /// `PUT /balloon`: a balloon.
    pub async fn put_balloon(&self, balloon: &Balloon) -> Result<(), CallError> {
        self.tell(Method::PUT, "/balloon".to_owned(), balloon).await
    }

    /// `PATCH /balloon`: a new size, while the guest runs.
    pub async fn patch_balloon(&self, update: &BalloonUpdate) -> Result<(), CallError> {
        self.tell(Method::PATCH, "/balloon".to_owned(), update)
            .await
    }

    /// `GET /balloon/statistics`: what the guest said of its memory.
    pub async fn balloon_statistics(&self) -> Result<BalloonStats, CallError> {
        self.get("/balloon/statistics").await
    }

    /// `PATCH /balloon/statistics`: another interval between statistics.
    pub async fn patch_balloon_statistics(
        &self,
        update: &BalloonStatsUpdate,
    ) -> Result<(), CallError> {
        self.tell(Method::PATCH, "/balloon/statistics".to_owned(), update)
            .await
    }

    /// `PATCH /balloon/hinting/start`: starts a run in which the guest names its free pages.
    /// Firecracker ≥ 1.14 (developer preview).
    pub async fn start_balloon_hinting(&self, command: &BalloonStartCmd) -> Result<(), CallError> {
        let path = "/balloon/hinting/start".to_owned();
        self.require(Feature::BalloonHinting, &Method::PATCH, &path)
            .await?;
        self.tell(Method::PATCH, path, command).await
    }

    /// `GET /balloon/hinting/status`: where that run stands. Firecracker ≥ 1.14 (developer preview).
    pub async fn balloon_hinting_status(&self) -> Result<BalloonHintingStatus, CallError> {
        let path = "/balloon/hinting/status";
        self.require(Feature::BalloonHinting, &Method::GET, path)
            .await?;
        self.get(path).await
    }

    /// `PATCH /balloon/hinting/stop`: ends that run. Firecracker ≥ 1.14 (developer preview).
    pub async fn stop_balloon_hinting(&self) -> Result<(), CallError> {
        let path = "/balloon/hinting/stop".to_owned();
        self.require(Feature::BalloonHinting, &Method::PATCH, &path)
            .await?;
        self.ask(Method::PATCH, path).await
    }

    /// `GET /hotplug/memory`: how much memory is plugged in. After the guest started; Firecracker ≥ 1.14.
    pub async fn memory_hotplug(&self) -> Result<MemoryHotplugStatus, CallError> {
        let path = "/hotplug/memory";
        self.require(Feature::MemoryHotplug, &Method::GET, path)
            .await?;
        self.get(path).await
    }

    /// `PUT /hotplug/memory`: room for memory to plug in. Before the guest starts; Firecracker ≥ 1.14.
    pub async fn put_memory_hotplug(&self, config: &MemoryHotplugConfig) -> Result<(), CallError> {
        let path = "/hotplug/memory".to_owned();
        self.require(Feature::MemoryHotplug, &Method::PUT, &path)
            .await?;
        self.tell(Method::PUT, path, config).await
    }

    /// `PATCH /hotplug/memory`: how much memory shall be plugged in. Firecracker ≥ 1.14.
    pub async fn patch_memory_hotplug(
        &self,
        update: &MemoryHotplugSizeUpdate,
    ) -> Result<(), CallError> {
        let path = "/hotplug/memory".to_owned();
        self.require(Feature::MemoryHotplug, &Method::PATCH, &path)
            .await?;
        self.tell(Method::PATCH, path, update).await
    }
}
