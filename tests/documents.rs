//! The documents: the README is short, no link leads nowhere, and every page can be found from the README.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A README that a person reads.
const MOST_README_BYTES: u64 = 9_000;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// README.md, ARCHITECTURE.md, CHANGELOG.md, the calibration text's page and everything below docs/.
fn documents() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "calibration/README.md"]
        .map(|name| root().join(name))
        .to_vec();
    let mut folders = vec![root().join("docs")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                found.push(path);
            }
        }
    }
    found
}

/// The lines of a page that are text: without fenced and indented code. In lists an indented line is text, too; links do
/// not stand in code there.
fn text_lines(page: &str) -> Vec<&str> {
    let mut in_fence = false;
    page.lines()
        .filter(|line| {
            let is_fence = line.trim_start().starts_with("```");
            in_fence ^= is_fence;
            !(in_fence || is_fence || line.starts_with("    "))
        })
        .collect()
}

/// A line without its code spans.
fn without_code(line: &str) -> String {
    line.split('`').step_by(2).collect()
}

/// Targets of all links and images of a page, but for those to other sites.
fn links(page: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in text_lines(page) {
        let line = without_code(line);
        for after in line.split("](").skip(1) {
            let end = after.find(')').unwrap_or_else(|| panic!("a link without an end: {line}"));
            found.push(after[..end].to_owned());
        }
        if let Some((_, target)) = line.split_once("]: ").filter(|_| line.starts_with('[')) {
            found.push(target.trim().to_owned());
        }
    }
    found.retain(|link| !link.starts_with("https://") && !link.starts_with("http://"));
    found
}

/// Anchors of a page's headings as GitHub makes them: lower case, spaces to hyphens, punctuation left out, and a number
/// behind those that occur again.
fn anchors(page: &str) -> BTreeSet<String> {
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    let mut found = BTreeSet::new();
    for line in text_lines(page) {
        let title = line.trim_start_matches('#');
        let level = line.len() - title.len();
        if !(1..=6).contains(&level) || !title.starts_with(' ') {
            continue;
        }
        let anchor: String = title
            .trim()
            .chars()
            .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
            .flat_map(char::to_lowercase)
            .map(|c| if c == ' ' { '-' } else { c })
            .collect();
        let again = seen.entry(anchor.clone()).or_insert(0);
        found.insert(if *again == 0 { anchor } else { format!("{anchor}-{again}") });
        *again += 1;
    }
    found
}

/// The file that a link of `page` names, the page itself for a mere anchor, and the anchor.
fn target<'a>(page: &Path, link: &'a str) -> (PathBuf, Option<&'a str>) {
    let (file, anchor) = link.split_once('#').map_or((link, None), |(file, anchor)| (file, Some(anchor)));
    let path = if file.is_empty() { page.to_owned() } else { page.parent().unwrap().join(file) };
    (path, anchor)
}

/// What is wrong with a link of `page`.
fn problem(page: &Path, link: &str) -> Option<String> {
    let (path, anchor) = target(page, link);
    let Ok(path) = path.canonicalize() else { return Some(format!("{link}: no such file")) };
    let anchor = anchor?;
    let headings = fs::read_to_string(&path).map(|text| anchors(&text)).unwrap_or_default();
    (!headings.contains(anchor)).then(|| format!("{link}: no such heading; there are {headings:?}"))
}

#[test]
fn the_readme_is_short_and_opens_with_the_two_commands() {
    let readme = root().join("README.md");
    let bytes = fs::metadata(&readme).unwrap().len();
    assert!(bytes <= MOST_README_BYTES, "README.md has {bytes} bytes, at most {MOST_README_BYTES} are allowed");
    let text = fs::read_to_string(readme).unwrap();
    let first: Vec<&str> = text.lines().filter(|line| !line.is_empty()).take(3).collect();
    assert!(first[1].starts_with("    cargo run --release -- quantize tests/data/"), "{first:?}");
    assert_eq!(first[2], "    cargo test");
}

#[test]
fn every_link_of_the_documents_leads_somewhere() {
    let mut problems = Vec::new();
    let mut checked = 0;
    for page in documents() {
        let links = links(&fs::read_to_string(&page).unwrap());
        checked += links.len();
        let of_page = links.iter().filter_map(|link| problem(&page, link));
        problems.extend(of_page.map(|problem| format!("{}: {problem}", page.display())));
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    assert!(checked > 50, "only {checked} links were found");
}

#[test]
fn every_document_can_be_reached_from_the_readme() {
    let start = root().join("README.md").canonicalize().unwrap();
    let mut reached = BTreeSet::from([start.clone()]);
    let mut open = vec![start];
    while let Some(page) = open.pop() {
        for link in links(&fs::read_to_string(&page).unwrap()) {
            let Ok(path) = target(&page, &link).0.canonicalize() else { continue };
            let is_page = path.extension().is_some_and(|extension| extension == "md");
            if is_page && reached.insert(path.clone()) {
                open.push(path);
            }
        }
    }
    let lost: Vec<_> =
        documents().into_iter().filter(|page| !reached.contains(&page.canonicalize().unwrap())).collect();
    assert!(lost.is_empty(), "no link from the README leads to {lost:?}");
}

#[test]
fn links_in_text_are_found_and_links_in_code_are_not() {
    let page = "see [a](a.md#b), ![c](c.svg) and `[d](d.md)`\n\n    [e](e.md)\n\n```\n[f](f.md)\n```\n[g]: g.md\n\
                [h](https://example.org)\n";
    assert_eq!(links(page), ["a.md#b", "c.svg", "g.md"]);
}

#[test]
fn anchors_are_those_of_headings_alone() {
    let page = "# One `two`, three\n\n## plan.json\n\n## A\n\n## A\n\n    # code\n\n```\n# fence\n```\n#hash\n";
    let expected = ["a", "a-1", "one-two-three", "planjson"].map(str::to_owned);
    assert_eq!(anchors(page), BTreeSet::from(expected));
}

#[test]
fn a_link_without_file_or_heading_is_a_problem() {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("page.md");
    fs::write(&page, "# Title\n").unwrap();
    assert_eq!(problem(&page, "page.md"), None);
    assert_eq!(problem(&page, "#title"), None);
    assert!(problem(&page, "other.md").is_some_and(|problem| problem.contains("no such file")));
    assert!(problem(&page, "page.md#other").is_some_and(|problem| problem.contains("no such heading")));
}
