use super::sample::{Layout, SampleSpec, write_sample_data};
use super::*;
use crate::data::cache_testing::TestDirectory;
use crate::data::{BatchAhead, DataError, Dataset, ReadRequest, Scratch};
use crate::task::pass::Opening;
use crate::task::{Datasets, Team};
use cache::client::CacheClient;
use spec::config::Config;
use spec::task::yolo::{ImageCache, YoloConfig};
use std::path::Path;
use std::sync::Arc;

fn spec(layout: Layout) -> SampleSpec {
    SampleSpec { train: 12, val: 5, side: 64, objects: 3, layout, seed: 7 }
}

fn config(root: &Path) -> Config {
    let mut config = spec::task::config("yolo");
    config.data.dataset_path = root.to_owned();
    config.train.batch_size = 2;
    config.with_section(|yolo: &mut YoloConfig| {
        (yolo.imgsz, yolo.mosaic_window) = (64, 4);
        yolo.augment.mixup = 0.4;
    });
    config
}

fn sample(layout: Layout) -> (tempfile::TempDir, Config) {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("shapes");
    write_sample_data(&root, &spec(layout)).unwrap();
    let config = config(&root);
    (dir, config)
}

/// A sample's fields, ragged ones at their length.
fn read(data: &dyn Dataset, epoch: u64, index: usize) -> Vec<Vec<u8>> {
    let mut fields: Vec<Vec<u8>> = data.fields().iter().map(|field| vec![0; field.sample_bytes()]).collect();
    let mut out: Vec<&mut [u8]> = fields.iter_mut().map(Vec::as_mut_slice).collect();
    data.read(ReadRequest { epoch, index }, &mut out, &mut Scratch::default()).unwrap();
    out.iter().map(|field| field.to_vec()).collect()
}

fn floats(bytes: &[u8]) -> Vec<[f32; 5]> {
    let numbers: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_ne_bytes(*bytes)).collect();
    numbers.as_chunks::<5>().0.to_vec()
}

fn facts(data: &Datasets) -> Arc<YoloFacts> {
    Arc::clone(data.facts.as_ref().unwrap()).downcast().unwrap()
}

fn opened(config: &Config, cache: Option<Arc<CacheClient>>) -> Datasets {
    let index = tempfile::tempdir().unwrap();
    open(config, &Team { cache, ..Team::alone() }, index.path()).unwrap()
}

fn open_train(config: &Config, index_dir: &Path) -> Arc<train::TrainImages> {
    super::open::open_images(config, &Team::alone(), index_dir).unwrap().train
}

#[test]
fn samples_depend_on_seed_epoch_and_index_alone() {
    let (_dir, mut config) = sample(Layout::Yolo);
    let data = opened(&config, None);
    let again = opened(&config, None);
    // In another order, and after others.
    let first: Vec<_> = (0..12).map(|index| read(data.train.as_ref(), 1, index)).collect();
    let second: Vec<_> = (0..12).rev().map(|index| read(again.train.as_ref(), 1, index)).collect();
    assert!(first.iter().zip(second.iter().rev()).all(|(a, b)| a == b));
    assert!(first[0] != first[1] && first[0] != read(data.train.as_ref(), 2, 0));
    config.seed += 1;
    assert_ne!(first[0], read(opened(&config, None).train.as_ref(), 1, 0));
    let boxes: Vec<[f32; 5]> = first.iter().flat_map(|fields| floats(&fields[1])).collect();
    assert!(boxes.len() > 12 && boxes.iter().flatten().all(|number| (0.0..=2.0).contains(number)), "{boxes:?}");
    // Four images in each of two mosaics.
    let most = data.train.fields()[1].most_rows();
    assert!(most.is_multiple_of(8) && most <= 8 * facts(&data).most, "{most}");
}

/// Memory decides about speed, never about results.
#[test]
fn what_the_page_cache_holds_changes_no_pixel() {
    let (_dir, mut config) = sample(Layout::Yolo);
    let plain = opened(&config, None);
    let expected: Vec<_> = (0..12).map(|index| read(plain.train.as_ref(), 0, index)).collect();
    let validation: Vec<_> = (0..5).map(|index| read(plain.val.as_ref(), 0, index)).collect();
    for content in [ImageCache::Resized, ImageCache::Encoded, ImageCache::Auto] {
        config.with_section(|yolo: &mut YoloConfig| yolo.cache = content);
        let directory = TestDirectory::new(8 << 20);
        let client = directory.client(0, 0, false);
        let data = opened(&config, Some(Arc::clone(&client)));
        for (data, samples) in [(&data.train, &expected), (&data.val, &validation)] {
            for (index, expected) in samples.iter().enumerate() {
                let ids = [index as u64];
                data.announce(BatchAhead { epoch: 0, ids: &ids });
                assert_eq!(&read(data.as_ref(), 0, index), expected, "{content:?} {index}");
                data.retire(BatchAhead { epoch: 0, ids: &ids });
            }
        }
        let stats = client.stats();
        assert_eq!((stats.misses, stats.bypasses), (17, 0), "each image once: {content:?} {stats:?}");
    }
}

#[test]
fn checklist_19_the_second_epoch_reads_no_file() {
    let (dir, mut config) = sample(Layout::Yolo);
    config.with_section(|yolo: &mut YoloConfig| yolo.cache = ImageCache::Resized);
    let directory = TestDirectory::new(8 << 20);
    let client = directory.client(0, 0, false);
    let data = opened(&config, Some(client));
    let all = |epoch: u64| (0..12).map(|index| read(data.train.as_ref(), epoch, index)).collect::<Vec<_>>();
    all(0);
    std::fs::remove_dir_all(dir.path().join("shapes/images")).unwrap();
    assert_eq!(all(1).len(), 12);
}

#[test]
fn all_layouts_of_labels_are_one_data_set() {
    let (_dir, config) = sample(Layout::Yolo);
    let expected = opened(&config, None);
    for layout in [Layout::Coco, Layout::Labelme] {
        let (_dir, config) = sample(layout);
        let data = opened(&config, None);
        assert_eq!(facts(&data).names, facts(&expected).names);
        assert_eq!((data.train.len(), data.val.len()), (12, 5));
        for index in 0..5 {
            let (a, b) = (read(data.val.as_ref(), 0, index), read(expected.val.as_ref(), 0, index));
            assert!(a[0] == b[0] && a[1] == b[1], "{layout:?}");
            let rows = floats(&a[2]).into_iter().flatten().zip(floats(&b[2]).into_iter().flatten());
            assert!(rows.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) < 1e-5, "{layout:?}");
        }
    }
}

#[test]
fn partners_come_from_the_images_before_in_the_order() {
    let (_dir, config) = sample(Layout::Yolo);
    let index = tempfile::tempdir().unwrap();
    let order = crate::data::loader::order_of(12, &config.data, config.seed, || None).unwrap().epoch(3);
    let train = open_train(&config, index.path());
    for sample in 0..12 {
        let position = order.position_of(sample).unwrap() as i64;
        let parts = train.parts(3, sample);
        assert_eq!((parts.main.len(), parts.main[0]), (4, sample));
        for partner in parts.main.iter().chain(&parts.mixed) {
            let at = order.position_of(*partner).unwrap() as i64;
            // At the beginning of an epoch, from its first images.
            let low = (position - 3).max(0);
            assert!((low..low + 4).contains(&at) || (position < 3 && at < 4), "{position} {at}");
        }
    }
}

#[test]
fn mosaic_ends_before_the_last_epochs() {
    let (_dir, mut config) = sample(Layout::Yolo);
    config.train.num_epochs = 20;
    let index = tempfile::tempdir().unwrap();
    let train = open_train(&config, index.path());
    let layers = |epoch: u64| (0..12).map(|sample| train.parts(epoch, sample).main.len()).max();
    assert_eq!((layers(9), layers(10), layers(19)), (Some(4), Some(1), Some(1)));
    config.with_section(|yolo: &mut YoloConfig| yolo.close_mosaic = 0);
    assert_eq!(open_train(&config, index.path()).parts(19, 0).main.len(), 4);
}

#[test]
fn bad_labels_and_images_are_left_out_by_name() {
    let (dir, mut config) = sample(Layout::Yolo);
    let root = dir.path().join("shapes");
    std::fs::write(root.join("labels/train/00001.txt"), "0 .5 .5 .1 .1\n0 1.5 .5 .1 .1\n").unwrap();
    std::fs::write(root.join("images/train/00002.png"), b"nothing").unwrap();
    std::fs::remove_file(root.join("labels/train/00003.txt")).unwrap();
    crate::data::source::video::image::write_png(
        &root.join("images/train/00004.png"),
        &[0; 9 * 20 * 3],
        crate::data::source::video::image::ImageSize { height: 9, width: 20 },
    )
    .unwrap();
    let data = opened(&config, None);
    assert_eq!((data.train.len(), data.skipped.len(), facts(&data).backgrounds), (9, 3, 1), "{:?}", data.skipped);
    let text = data.skipped.join("\n");
    for says in ["00001.txt: line 2: 1.5 is above 1", "00002.png: no picture", "00004.png: an image of 9×20 pixels"] {
        assert!(text.contains(says), "{text}");
    }
    // Of these nothing is kept: the next start says so again, and looks whether they can be used now.
    let index = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        let again = open(&config, &Team::alone(), index.path()).unwrap();
        assert_eq!((again.train.len(), again.skipped.len()), (9, 3));
        let kept = super::index::load(&super::index::path(index.path(), &root));
        assert!(kept.len() == 14 && kept.values().all(|finding| matches!(finding, super::index::Finding::Good(_))));
    }
    config.data.skip_bad = false;
    let error = open(&config, &Team::alone(), index.path()).err().unwrap().to_string();
    assert!(error.contains("line 2") && error.contains("data.skip_bad: true leaves such images out"), "{error}");
}

/// Damage that only decoding shows.
#[test]
fn damaged_images_are_replaced_in_training_and_left_out_of_validation() {
    let (dir, mut config) = sample(Layout::Yolo);
    let root = dir.path().join("shapes");
    for name in ["images/train/00005.png", "images/val/00014.png"] {
        let mut bytes = std::fs::read(root.join(name)).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle..middle + 40].fill(0);
        std::fs::write(root.join(name), bytes).unwrap();
    }
    let data = opened(&config, None);
    (0..12).for_each(|index| drop(read(data.train.as_ref(), 0, index)));
    let lines = data.train.take_left_out().unwrap();
    assert!(lines.len() == 1 && lines[0].contains("00005.png") && lines[0].ends_with("left out"), "{lines:?}");
    (0..5).for_each(|index| drop(read(data.val.as_ref(), 0, index)));
    let bad: Vec<u64> = (0..5).filter(|index| data.val.is_left_out(*index)).collect();
    assert_eq!((bad.len(), data.val.take_left_out().unwrap().len()), (1, 1));
    assert!(facts(&data).images[1][bad[0] as usize].ends_with("images/val/00014.png"));
    config.data.skip_bad = false;
    let data = opened(&config, None);
    let mut fields: Vec<Vec<u8>> = data.val.fields().iter().map(|field| vec![0; field.sample_bytes()]).collect();
    let mut out: Vec<&mut [u8]> = fields.iter_mut().map(Vec::as_mut_slice).collect();
    let request = ReadRequest { epoch: 0, index: bad[0] as usize };
    let error = data.val.read(request, &mut out, &mut Scratch::default()).unwrap_err();
    assert!(matches!(error, DataError::Content { .. }), "{error}");
}

/// Two ranks share the work, and the next start looks at nothing.
#[test]
fn findings_are_shared_and_kept() {
    let (dir, config) = sample(Layout::Yolo);
    let index = tempfile::tempdir().unwrap();
    let expected = opened(&config, None);
    let (to, from) = (std::sync::Mutex::new(Vec::new()), std::sync::Barrier::new(2));
    std::thread::scope(|scope| {
        for rank in 0..2 {
            let (to, from, config, index, expected) = (&to, &from, &config, &index, &expected);
            scope.spawn(move || {
                let gather = move |bytes: &[u8]| {
                    to.lock().unwrap().push((rank, bytes.to_vec()));
                    from.wait();
                    let mut all = to.lock().unwrap().clone();
                    from.wait();
                    to.lock().unwrap().clear();
                    from.wait();
                    all.sort();
                    Ok(all.into_iter().map(|(_, bytes)| bytes).collect())
                };
                let team = Team { rank, world_size: 2, gather: &gather, ..Team::alone() };
                let data = open(config, &team, index.path()).unwrap();
                assert_eq!(facts(&data), facts(expected));
                assert_eq!(read(data.train.as_ref(), 0, 3), read(expected.train.as_ref(), 0, 3));
            });
        }
    });
    // A file that is touched is looked at again; others are not even opened.
    let image = dir.path().join("shapes/images/train/00000.png");
    let before = std::fs::metadata(&image).unwrap().modified().unwrap();
    let open_again = || open(&config, &Team::alone(), index.path()).unwrap();
    assert_eq!(facts(&open_again()), facts(&expected));
    std::fs::write(dir.path().join("shapes/labels/train/00000.txt"), "9 .5 .5 .1 .1\n").unwrap();
    assert!(open_again().skipped[0].contains("class 9"), "{before:?}");
}

#[test]
fn images_without_labels_can_be_predicted_for() {
    let (dir, config) = sample(Layout::Yolo);
    let mut other = config.clone();
    other.data.dataset_path = dir.path().join("shapes/images/val");
    let team = Team::alone();
    let carried = opened(&config, None).carried.unwrap();
    let opening = |config| Opening { config, team: &team, index_dir: dir.path(), carried: Some(&carried) };
    let data = unlabelled(&opening(&other)).unwrap();
    assert_eq!((data.val.len(), data.train.len()), (5, 0));
    let fields = read(data.val.as_ref(), 0, 0);
    assert_eq!((fields[0].len(), fields[2].len()), (3 * 64 * 64, 0));
    assert!(facts(&data).images[1].is_sorted() && facts(&data).names == ["circle", "square", "triangle"]);
    assert_eq!(data.val.fields().len(), predict_outline(&other).unwrap().datasets.val.fields().len());
    let all = evaluation(&opening(&config)).unwrap();
    assert_eq!((all.val.len(), facts(&all).names.len()), (5, 3));
    let yaml = dir.path().join("shapes/data.yaml");
    std::fs::write(&yaml, std::fs::read_to_string(&yaml).unwrap().replace("circle", "ring")).unwrap();
    let error = evaluation(&opening(&config)).err().unwrap().to_string();
    assert!(error.contains("its classes are ring, square, triangle, the run was trained on circle"), "{error}");
}

/// An evaluation of the training images sees them without augmentation, and judges what is found.
#[test]
fn training_images_are_evaluated_whole() {
    let (_dir, config) = sample(Layout::Yolo);
    let data = opened(&config, None);
    let whole = data.train_whole.as_ref().unwrap();
    assert_eq!((whole.len(), whole.fields().len()), (12, data.val.fields().len()));
    let (first, again) = (read(whole.as_ref(), 0, 0), read(whole.as_ref(), 5, 0));
    assert!(first == again && !floats(&first[2]).is_empty());
    // Square shapes of one size keep their order.
    assert!(whole.describe(0).ends_with("images/train/00000.png"), "{}", whole.describe(0));
}

/// Labelled images of another place need no training images among them, and no object of every class.
#[test]
fn a_run_is_evaluated_on_labelled_images_of_any_form() {
    let (_dir, config) = sample(Layout::Yolo);
    let carried = opened(&config, None).carried.unwrap();
    let team = Team::alone();
    for layout in [Layout::Yolo, Layout::Coco, Layout::Labelme] {
        let (dir, config) = sample(layout);
        let root = dir.path().join("shapes");
        match layout {
            Layout::Yolo => {
                let text = "path: .\nval: images/val\nnames: [circle, square, triangle]\n";
                std::fs::write(root.join("data.yaml"), text).unwrap();
            }
            Layout::Coco => std::fs::remove_file(root.join("annotations/instances_train2017.json")).unwrap(),
            Layout::Labelme => {
                // All in one folder, of which one image with circles alone stays.
                let one = dir.path().join("one");
                std::fs::create_dir(&one).unwrap();
                let shapes = "{\"label\": \"circle\", \"points\": [[5, 5], [30, 30]], \"shape_type\": \"rectangle\"}";
                std::fs::write(one.join("a.json"), format!("{{\"shapes\": [{shapes}]}}")).unwrap();
                let image = facts(&opened(&config, None)).images[1][0].clone();
                std::fs::copy(image, one.join("a.png")).unwrap();
                std::fs::remove_dir_all(&root).unwrap();
                std::fs::rename(&one, &root).unwrap();
            }
        }
        let opening = Opening { config: &config, team: &team, index_dir: dir.path(), carried: Some(&carried) };
        let all = evaluation(&opening).unwrap_or_else(|error| panic!("{layout:?}: {error}"));
        let images = if layout == Layout::Labelme { 1 } else { 5 };
        assert_eq!(
            (all.val.len(), facts(&all).names.join(" ")),
            (images, "circle square triangle".into()),
            "{layout:?}"
        );
    }
}

/// All objects are of one class in the training, so they are in an evaluation.
#[test]
fn a_run_of_one_class_is_evaluated_on_the_labels_that_it_was_trained_on() {
    let (dir, mut config) = sample(Layout::Yolo);
    config.with_section(|yolo: &mut YoloConfig| yolo.single_cls = true);
    let carried = opened(&config, None).carried.unwrap();
    let team = Team::alone();
    let opening = Opening { config: &config, team: &team, index_dir: dir.path(), carried: Some(&carried) };
    let all = evaluation(&opening).unwrap();
    assert_eq!((all.val.len(), facts(&all).names.clone()), (5, vec!["item".to_owned()]));
}

#[test]
fn training_without_an_object_is_warned_of() {
    let (dir, config) = sample(Layout::Yolo);
    assert!(!opened(&config, None).notes.concat().contains("warning"));
    std::fs::rename(dir.path().join("shapes/labels"), dir.path().join("shapes/label")).unwrap();
    let notes = opened(&config, None).notes.join("\n");
    assert!(notes.contains("warning: none of the 12 training images has an object"), "{notes}");
    assert!(notes.contains("shapes/labels/train/00000.txt"), "{notes}");
}

#[test]
fn an_outline_has_the_shapes_of_the_open_data_set() {
    let (dir, mut config) = sample(Layout::Yolo);
    let data = opened(&config, None);
    let outline = outline(&config, dir.path()).unwrap();
    assert_eq!(outline.datasets.train.fields(), data.train.fields());
    assert_eq!(outline.datasets.val.fields(), data.val.fields());
    assert_eq!(outline.sizes.useful_bytes, 17 * 3 * 64 * 64);
    config.with_section(|yolo: &mut YoloConfig| yolo.cache = ImageCache::Off);
    assert_eq!(super::outline(&config, dir.path()).unwrap().sizes.useful_bytes, 0);
    config.data.sample_if_missing = true;
    config.data.dataset_path = dir.path().join("missing");
    assert!(super::outline(&config, dir.path()).unwrap().datasets.facts.is_some());
}

#[test]
fn a_file_that_changes_under_the_run_is_an_error() {
    let (dir, config) = sample(Layout::Yolo);
    let data = opened(&config, None);
    let path = dir.path().join("shapes/images/val/00013.png");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let at = facts(&data).images[1].iter().position(|image| *image == path).unwrap();
    let mut fields: Vec<Vec<u8>> = data.val.fields().iter().map(|field| vec![0; field.sample_bytes()]).collect();
    let mut out: Vec<&mut [u8]> = fields.iter_mut().map(Vec::as_mut_slice).collect();
    let error = data.val.read(ReadRequest { epoch: 0, index: at }, &mut out, &mut Scratch::default()).unwrap_err();
    assert!(error.to_string().contains("changed since the run began"), "{error}");
}
