//! Which devices ranks find, on the model.

use super::counts::job;

#[test]
fn a_scheduler_that_shows_each_rank_its_own_device_alone_is_served() {
    // As SLURM's --gpus-per-task=1 with another launcher's ranks: one device is visible, and it is number 0 for all.
    let done = job("net", 1, &["train.cuda_graph=off"]).env("CUDA_VISIBLE_DEVICES", "0").run();
    assert_eq!(done.ended.code, Some(0), "{}", done.ended);
    assert_eq!(done.reports()[&0].list("contexts"), ["0"]);
}

#[test]
fn ranks_count_devices_by_their_place_on_the_bus() {
    let done = job("net", 1, &["train.cuda_graph=off"]).run();
    assert_eq!(done.ended.code, Some(0), "{}", done.ended);
    assert_eq!(done.reports()[&0].0["device_order"], "PCI_BUS_ID");
}

#[test]
fn parts_of_a_divided_device_are_taken_by_name() {
    let mig = "MIG-00000001-0000-0000-0000-000000000000";
    let done =
        job("net", 1, &["train.cuda_graph=off"]).env("CUDA_VISIBLE_DEVICES", mig).env("FAKE_NVML_MIG", "1").run();
    assert_eq!(done.ended.code, Some(0), "{}", done.ended);
    assert_eq!(done.reports().len(), 1, "trained on the device: {}", done.text());
    assert!(!done.text().contains("hides all"), "{}", done.text());
}

#[test]
fn without_nvml_training_falls_back_to_the_cpu() {
    let done = job("net", 1, &[]).without_nvml().run();
    assert_eq!(done.ended.code, Some(0), "{}", done.ended);
    assert!(done.text().contains("1 GPU asked for, none present"), "{}", done.text());
}
