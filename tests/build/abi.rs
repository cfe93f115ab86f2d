//! `src/abi.rs` is what bindgen makes of `kernels/abi.h`, today.
//!
//! After a change to the header: `WRITE_ABI=1 cargo test --test build abi`. Needs libclang
//! (`LIBCLANG_PATH`).

use test_support::Skip;

/// Skips where bindgen finds no libclang, by which it panics.
pub fn no_libclang() -> Skip {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = std::panic::catch_unwind(bindgen::clang_version).is_ok();
    std::panic::set_hook(usual);
    (!found).then(|| "no libclang: set LIBCLANG_PATH to its folder".to_owned())
}

#[derive(Debug)]
struct Pod;

impl bindgen::callbacks::ParseCallbacks for Pod {
    fn add_derives(&self, info: &bindgen::callbacks::DeriveInfo<'_>) -> Vec<String> {
        match info.kind {
            // Pod refuses padding: a struct with any fails the build.
            bindgen::callbacks::TypeKind::Struct => {
                vec!["bytemuck::Pod".into(), "bytemuck::Zeroable".into()]
            }
            _ => vec![],
        }
    }
}

pub fn abi_rs_is_what_bindgen_makes_of_abi_h() {
    let generated = bindgen::Builder::default()
        .header("kernels/abi.h")
        .allowlist_file(".*abi\\.h")
        .prepend_enum_name(false)
        .parse_callbacks(Box::new(Pod))
        .formatter(bindgen::Formatter::Prettyplease)
        .disable_header_comment()
        .raw_line(
            "// Made by bindgen from kernels/abi.h: `WRITE_ABI=1 cargo test --test build abi`. Do \
             not edit.",
        )
        .generate()
        .expect("kernels/abi.h parses")
        .to_string();
    if std::env::var_os("WRITE_ABI").is_some() {
        std::fs::write("src/abi.rs", &generated).unwrap();
    }
    let committed = std::fs::read_to_string("src/abi.rs").unwrap();
    assert!(
        committed == generated,
        "src/abi.rs is not what bindgen makes of kernels/abi.h: run `WRITE_ABI=1 cargo test --test \
         build abi`"
    );
}
