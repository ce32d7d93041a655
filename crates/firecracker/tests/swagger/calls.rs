//! Every call of the client, made once.

use std::collections::BTreeSet;

use rekindle_firecracker::Client;
use rekindle_firecracker::model::*;
use rekindle_kit::fake::{FakeFirecracker, Reply};
use serde_json::json;

use crate::samples::samples;

/// Makes every call of the client once, and returns what came over the socket.
pub(crate) async fn all() -> BTreeSet<String> {
    let samples = samples();
    let answers = samples.clone();
    let fake = FakeFirecracker::start(move |request| match request.call().as_str() {
        "GET /" => Reply::json(200, &answers["InstanceInfo"]),
        "GET /version" => Reply::json(200, &json!({"firecracker_version": "1.17.0-dev"})),
        "GET /vm/config" => Reply::json(200, &answers["FullVmConfiguration"]),
        "GET /machine-config" => Reply::json(200, &answers["MachineConfiguration"]),
        "GET /mmds" => Reply::json(200, &json!({"latest": {}})),
        "GET /balloon" => Reply::json(200, &answers["Balloon"]),
        "GET /balloon/statistics" => Reply::json(200, &answers["BalloonStats"]),
        "GET /balloon/hinting/status" => Reply::json(200, &answers["BalloonHintingStatus"]),
        "GET /hotplug/memory" => Reply::json(200, &answers["MemoryHotplugStatus"]),
        _ => Reply::no_content(),
    });
    let client = Client::new(fake.socket());
    configure(&client).await;
    live(&client).await;
    fake.calls().into_iter().collect()
}

async fn configure(client: &Client) {
    let done = "the fake agrees";
    client
        .put_boot_source(&BootSource::new("vmlinux"))
        .await
        .expect(done);
    client
        .put_machine_config(&MachineConfiguration::new(1, 128))
        .await
        .expect(done);
    client
        .patch_machine_config(&MachineConfigurationUpdate::default().vcpu_count(2))
        .await
        .expect(done);
    client
        .put_cpu_config(&CpuConfig::default())
        .await
        .expect(done);
    client
        .put_drive(&Drive::new("{drive_id}", "disk"))
        .await
        .expect(done);
    client
        .put_pmem(&Pmem::new("{id}", "file"))
        .await
        .expect(done);
    client
        .put_network_interface(&NetworkInterface::new("{iface_id}", "tap0"))
        .await
        .expect(done);
    client
        .put_vsock(&Vsock::new(3, "v.sock"))
        .await
        .expect(done);
    client
        .put_entropy(&EntropyDevice::default())
        .await
        .expect(done);
    client
        .put_serial(&SerialDevice::default())
        .await
        .expect(done);
    client.put_logger(&Logger::default()).await.expect(done);
    client
        .put_metrics(&Metrics::new("metrics"))
        .await
        .expect(done);
    client
        .put_mmds_config(&MmdsConfig::new(["eth0"]))
        .await
        .expect(done);
    client
        .put_mmds(&MmdsContentsObject::new())
        .await
        .expect(done);
    client
        .patch_mmds(&MmdsContentsObject::new())
        .await
        .expect(done);
    client
        .put_balloon(&Balloon::new(1).deflate_on_oom(true))
        .await
        .expect(done);
    client
        .put_memory_hotplug(&MemoryHotplugConfig::new(128))
        .await
        .expect(done);
}

async fn live(client: &Client) {
    let done = "the fake agrees";
    client.start().await.expect(done);
    client.flush_metrics().await.expect(done);
    client.send_ctrl_alt_del().await.expect(done);
    client.pause().await.expect(done);
    client.resume().await.expect(done);
    client
        .patch_drive(&PartialDrive::new("{drive_id}"))
        .await
        .expect(done);
    client
        .patch_pmem(&PartialPmem::new("{id}"))
        .await
        .expect(done);
    client
        .patch_network_interface(&PartialNetworkInterface::new("{iface_id}"))
        .await
        .expect(done);
    client.delete_drive("{drive_id}").await.expect(done);
    client.delete_pmem("{id}").await.expect(done);
    client
        .delete_network_interface("{iface_id}")
        .await
        .expect(done);
    client
        .patch_balloon(&BalloonUpdate::new(1))
        .await
        .expect(done);
    client
        .patch_balloon_statistics(&BalloonStatsUpdate::new(1))
        .await
        .expect(done);
    client
        .start_balloon_hinting(&BalloonStartCmd::default())
        .await
        .expect(done);
    client.stop_balloon_hinting().await.expect(done);
    client
        .patch_memory_hotplug(&MemoryHotplugSizeUpdate::new(128))
        .await
        .expect(done);
    client
        .create_snapshot(&SnapshotCreateParams::diff("vmstate", "memory"))
        .await
        .expect(done);
    let load = SnapshotLoadParams::new("vmstate", MemoryBackend::file("memory"));
    client.load_snapshot(&load).await.expect(done);
    client.describe().await.expect(done);
    client.vm_config().await.expect(done);
    client.machine_config().await.expect(done);
    client.mmds().await.expect(done);
    client.balloon().await.expect(done);
    client.balloon_statistics().await.expect(done);
    client.balloon_hinting_status().await.expect(done);
    client.memory_hotplug().await.expect(done);
}
