use super::*;
use std::fs;
use std::os::unix::ffi::OsStringExt;

const DIVISION: Division = Division { shares: [0.7, 0.2, 0.1], seed: 1, trains: true };

/// Writes empty files; they are not looked at here.
fn touch(root: &Path, names: &[&str]) {
    for name in names {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, b"").unwrap();
    }
}

fn stems(items: &[Item]) -> Vec<String> {
    items.iter().map(|item| item.image.file_stem().unwrap().to_str().unwrap().to_string()).collect()
}

fn found(text: &str) -> Result<Found, DataError> {
    let dir = tempfile::tempdir().unwrap();
    touch(
        dir.path(),
        &["images/train/a.jpg", "images/train/b.PNG", "images/train/c.txt", "images/val/d.jpg", "images/x/e.jpg"],
    );
    fs::write(dir.path().join("list.txt"), "./images/x/e.jpg\n\n# a comment\nimages/val/d.jpg\n").unwrap();
    let file = dir.path().join("data.yaml");
    fs::write(&file, text).unwrap();
    find(&file, DIVISION)
}

#[test]
fn data_yaml_is_read_in_all_its_forms() {
    for (text, train, val, names) in [
        (
            "path: .\ntrain: images/train\nval: images/val\nnames: [a, b]\n",
            &["a", "b"][..],
            &["d"][..],
            &["a", "b"][..],
        ),
        ("train: images/train\nval: images/val\nnc: 2\nnames: {1: y, 0: x}\n", &["a", "b"], &["d"], &["x", "y"]),
        ("train: [images/train, images/x]\nval: list.txt\nnames:\n  0: 7\n", &["a", "b", "e"], &["d", "e"], &["7"]),
        ("train: list.txt\nval:\ntest: images/val\nnc: 3\n", &["d", "e"], &["d"], &["0", "1", "2"]),
        ("train: ../images/train\nval: ../images/val\nnames: [a]\n", &["a", "b"], &["d"], &["a"]),
        ("\u{feff}train: images\nvalid: images/val/d.jpg\nnames: [a]\n", &["a", "b", "d", "e"], &["d"], &["a"]),
    ] {
        let found = found(text).unwrap();
        assert_eq!(
            (stems(&found.splits[0]), stems(&found.splits[1])),
            (train.iter().map(ToString::to_string).collect(), val.iter().map(ToString::to_string).collect::<Vec<_>>()),
            "{text}"
        );
        assert_eq!(found.names.unwrap(), names, "{text}");
    }
}

#[test]
fn faults_of_data_yaml_are_named() {
    for (text, says) in [
        ("- a\n", "no mapping"),
        ("train: images/train\nval: images/val\n", "neither names nor nc is there"),
        ("train: images/train\nval: images/val\nnc: 3\nnames: [a, b]\n", "nc is 3 and names has 2"),
        ("train: images/train\nval: images/val\nnames: {0: a, 2: b}\n", "expected names of classes 0 to 1"),
        ("train: images/train\nval: images/none\nnames: [a]\n", "val names"),
        ("val: images/val\nnames: [a]\n", "train is missing or names no image (keys: val, names)"),
        ("train: images/train\nnames: [a]\n", "val is missing"),
        ("train: {a: b}\nval: images/val\nnames: [a]\n", "expected a folder, a text file of images, or a list"),
        ("train: images/train\nval: images/val\nnc: 0\n", "nc is"),
        ("a: [\n", "not valid YAML"),
    ] {
        let error = found(text).unwrap_err().to_string();
        assert!(error.contains(says), "{text}: {error}");
    }
    let error = find(Path::new("no/such/place"), DIVISION).unwrap_err().to_string();
    assert!(error.contains("does not exist: expected a data.yaml"), "{error}");
}

#[test]
fn labels_lie_where_the_last_folder_of_images_says() {
    for (image, label) in [
        ("/a/images/train/x.jpg", "/a/labels/train/x.txt"),
        ("/images/b/images/x.y.png", "/images/b/labels/x.y.txt"),
        ("/a/pictures/x.jpg", "/a/pictures/x.txt"),
        ("images/train/x.jpg", "labels/train/x.txt"),
        ("images/images", "labels/images.txt"),
        ("a/images2/x.jpg", "a/images2/x.txt"),
        ("./images/x.jpg", "./labels/x.txt"),
    ] {
        assert_eq!(label_path(Path::new(image)), Path::new(label));
    }
    let odd = |folder: &str, ending: &str| {
        let name = [folder.as_bytes(), b"caf\xe9", ending.as_bytes()].concat();
        PathBuf::from(OsString::from_vec(name))
    };
    assert_eq!(label_path(&odd("/a/images/", ".jpg")), odd("/a/labels/", ".txt"));
}

#[test]
fn folders_without_a_file_are_a_data_set() {
    let dir = tempfile::tempdir().unwrap();
    touch(dir.path(), &["images/train/a.jpg", "images/val/b.jpg"]);
    let found = find(dir.path(), DIVISION).unwrap();
    assert_eq!(
        (stems(&found.splits[0]), stems(&found.splits[1]), found.names),
        (vec!["a".into()], vec!["b".into()], None)
    );
    for (text, names) in [("cat\ndog\n", &["cat", "dog"][..]), ("\u{feff}cat\r\n\r\ndog\n\n", &["cat", "", "dog"])] {
        fs::write(dir.path().join("classes.txt"), text).unwrap();
        assert_eq!(find(dir.path(), DIVISION).unwrap().names.unwrap(), names);
    }
}

fn coco(annotations: &str) -> String {
    format!(
        "{{\"info\": {{}}, \"images\": [{{\"id\": 5, \"file_name\": \"a.jpg\", \"width\": 100, \"height\": 50}}, \
         {{\"id\": 6, \"file_name\": \"b.jpg\", \"width\": 10, \"height\": 10}}], \
         \"categories\": [{{\"id\": 9, \"name\": \"dog\"}}, {{\"id\": 2, \"name\": \"cat\"}}], \"annotations\": [{annotations}]}}"
    )
}

#[test]
fn coco_is_read_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    touch(
        dir.path(),
        &["train2017/a.jpg", "train2017/b.jpg", "images/val2017/a.jpg", "annotations/captions_train2017.json"],
    );
    let boxes = "{\"image_id\": 5, \"category_id\": 9, \"bbox\": [10, 5, 20, 10], \"segmentation\": [[1, 2]]}, \
                 {\"image_id\": 5, \"category_id\": 2, \"bbox\": [0, 0, 50, 50], \"iscrowd\": 1}, \
                 {\"image_id\": 6, \"category_id\": 2, \"bbox\": [0, 0, 0, 5], \"iscrowd\": 0}";
    for split in ["train", "val"] {
        fs::write(dir.path().join(format!("annotations/instances_{split}2017.json")), coco(boxes)).unwrap();
    }
    let found = find(dir.path(), DIVISION).unwrap();
    assert_eq!(found.names.unwrap(), ["cat", "dog"]);
    assert_eq!(stems(&found.splits[0]), ["a", "b"]);
    assert!(found.splits[1][0].image.ends_with("images/val2017/a.jpg"));
    let Label::Coco(file, name) = &found.splits[0][0].label else { panic!("{:?}", found.splits[0][0]) };
    let read = CocoFile::read(file).unwrap();
    let expected = vec![[1.0, 0.2, 0.2, 0.2, 0.2]];
    assert_eq!((&read.objects[name].boxes, read.objects.len()), (&expected, 1));
    // An image that was made smaller keeps its boxes; one that is turned does not.
    for size in [(50, 100), (25, 50), (33, 67)] {
        assert_eq!(read.objects[name].on(size).as_ref(), Ok(&expected), "{size:?}");
    }
    let turned = read.objects[name].on((100, 50)).unwrap_err();
    assert!(turned.contains("says 50×100 pixels, the upright image has 100×50"), "{turned}");
    let outside = |bbox: &str| {
        let path = dir.path().join("outside.json");
        fs::write(&path, coco(&format!("{{\"image_id\": 5, \"category_id\": 2, \"bbox\": {bbox}}}"))).unwrap();
        CocoFile::read(&path).unwrap().objects["a.jpg"].on((50, 100)).unwrap_err()
    };
    assert!(
        outside("[90, 5, 110, 20]").contains("a box of class 0: 1.45 is above 1"),
        "{}",
        outside("[90, 5, 110, 20]")
    );
    assert!(outside("[-30, 5, 20, 20]").contains("-0.2 is below 0"));
    for (annotations, says) in [
        ("{\"image_id\": 7, \"category_id\": 2, \"bbox\": [1,1,2,2]}", "annotations[0]: image_id is 7, and no image"),
        ("{\"image_id\": 5, \"category_id\": 1, \"bbox\": [1,1,2,2]}", "category_id is 1, and no category"),
        ("{\"image_id\": 5, \"category_id\": 2, \"bbox\": [1,1,2]}", "bbox is [1.0, 1.0, 2.0]: expected x, y"),
        ("{", "no COCO annotations: "),
    ] {
        let path = dir.path().join("annotations/instances_train2017.json");
        fs::write(&path, coco(annotations)).unwrap();
        let error = CocoFile::read(&path).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

fn labelme(shapes: &str) -> String {
    format!(
        "{{\"version\": \"5\", \"flags\": {{}}, \"imageData\": \"AAAA\", \"imageHeight\": 50, \"imageWidth\": 100, \
             \"imagePath\": \"..\\\\x\\\\a.jpg\", \"shapes\": [{shapes}]}}"
    )
}

#[test]
fn labelme_shapes_become_boxes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.json");
    let boxes = |shapes: &str| {
        fs::write(&path, labelme(shapes)).unwrap();
        labelme_boxes(&path, (50, 100), &["cat".into(), "dog".into()]).map_err(|error| error.to_string())
    };
    let shape = |kind: &str, points: &str| {
        format!("{{\"label\": \"dog\", \"shape_type\": \"{kind}\", \"points\": {points}, \"group_id\": null}}")
    };
    for (kind, points, expected) in [
        ("rectangle", "[[30, 10], [10, 20]]", [1.0, 0.2, 0.3, 0.2, 0.2]),
        ("point", "[[50, 25]]", [1.0, 0.5, 0.5, 0.05, 0.1]),
        ("polygon", "[[0, 0], [20, 0], [10, 10]]", [1.0, 0.1, 0.1, 0.2, 0.2]),
        ("circle", "[[50, 25], [50, 15]]", [1.0, 0.5, 0.5, 0.2, 0.4]),
        ("rectangle", "[[-10, 10], [10, 20]]", [1.0, 0.05, 0.3, 0.1, 0.2]),
    ] {
        let [found] = boxes(&shape(kind, points)).unwrap()[..] else { panic!("{kind}") };
        let apart = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart < 1e-6, "{kind}: {found:?}");
    }
    assert!(boxes(&shape("rectangle", "[]")).unwrap_err().contains("shapes[0]: points are missing"));
    assert!(
        boxes("{\"label\": \"cow\", \"points\": [[1, 2]]}").unwrap_err().contains("label is \"cow\", which is none of")
    );
    fs::write(&path, labelme("")).unwrap();
    let error = labelme_boxes(&path, (40, 100), &[]).unwrap_err().to_string();
    assert!(error.contains("imageHeight is 50, and the image has 40 pixels"), "{error}");
}

#[test]
fn labelme_files_are_divided_by_folder_or_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let shape = "{\"label\": \"dog\", \"shape_type\": \"point\", \"points\": [[5, 5]]}";
    for n in 0..60 {
        touch(dir.path(), &[&format!("p{n}.jpg")]);
        fs::write(dir.path().join(format!("p{n}.json")), labelme(shape).replace("a.jpg", &format!("p{n}.jpg")))
            .unwrap();
    }
    let found = find(dir.path(), DIVISION).unwrap();
    let counts = found.splits.each_ref().map(Vec::len);
    assert_eq!(counts.iter().sum::<usize>(), 60);
    assert!(counts[0] > counts[1] && counts[1] > 0, "{counts:?}");
    assert_eq!(found, find(dir.path(), DIVISION).unwrap());
    // A file more moves no other.
    touch(dir.path(), &["q.png"]);
    fs::write(dir.path().join("q.json"), labelme(shape).replace("a.jpg", "q.png")).unwrap();
    let more = find(dir.path(), DIVISION).unwrap();
    for (before, after) in found.splits.iter().zip(&more.splits) {
        assert!(before.iter().all(|item| after.contains(item)));
    }
    fs::write(dir.path().join("r.json"), labelme(shape).replace("a.jpg", "r.jpg")).unwrap();
    assert!(find(dir.path(), DIVISION).unwrap_err().to_string().contains("its image is not beside it"));
}
