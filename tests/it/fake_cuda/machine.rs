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

#[test]
fn the_switches_of_the_libraries_reach_them() {
    for (sets, tf32, tried) in [
        (&["train.cuda_graph=off"][..], false, false),
        (&["train.cuda_graph=off", "train.tf32=true", "train.cudnn_benchmark=true"], true, true),
    ] {
        let done = job("emg", 1, sets).run();
        assert_eq!(done.ended.code, Some(0), "{}", done.ended);
        let counts = &done.reports()[&0].0["counts"];
        assert_eq!(counts["TF32"].as_u64().is_some(), tf32, "{sets:?}");
        assert_eq!(counts["cudnnFindConvolution"].as_u64().is_some(), tried, "{sets:?}");
    }
}

#[test]
fn a_world_of_one_goes_through_nccl_where_a_test_asks_for_it() {
    let done = job("net", 1, &["train.cuda_graph=on"]).env("HEADROOM_TEST_NCCL", "1").run();
    assert_eq!(done.ended.code, Some(0), "{}", done.ended);
    let report = &done.reports()[&0];
    assert_eq!(["inits", "finalized", "destroyed"].map(|end| report.number(end)), [1; 3]);
    assert!(report.captures()[0]["collectives"].as_u64().unwrap() > 0, "its sums are in the recorded step");
}
