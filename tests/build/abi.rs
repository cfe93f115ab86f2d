//! `src/abi.rs` is what bindgen makes of `kernels/abi.h`, today.
//!
//! After a change to the header: `WRITE_ABI=1 cargo test --test abi`. Needs libclang
//! (`LIBCLANG_PATH`); prints SKIPPED without it.

#[path = "../common/mod.rs"]
mod common;

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

#[test]
fn abi_rs_is_what_bindgen_makes_of_abi_h() {
    // bindgen panics when it finds no libclang.
    let generated = std::panic::catch_unwind(|| {
        bindgen::Builder::default()
            .header("kernels/abi.h")
            .allowlist_file(".*abi\\.h")
            .prepend_enum_name(false)
            .parse_callbacks(Box::new(Pod))
            .formatter(bindgen::Formatter::Prettyplease)
            .disable_header_comment()
            .raw_line(
                "// Made by bindgen from kernels/abi.h: `WRITE_ABI=1 cargo test --test abi`. Do \
                 not edit.",
            )
            .generate()
            .expect("kernels/abi.h parses")
            .to_string()
    });
    let Ok(generated) = generated else {
        return common::skipped(
            "abi_rs_is_what_bindgen_makes_of_abi_h",
            "libclang was not found: set LIBCLANG_PATH",
        );
    };
    if std::env::var_os("WRITE_ABI").is_some() {
        std::fs::write("src/abi.rs", &generated).unwrap();
    }
    let committed = std::fs::read_to_string("src/abi.rs").unwrap();
    assert!(
        committed == generated,
        "src/abi.rs is not what bindgen makes of kernels/abi.h: run `WRITE_ABI=1 cargo test --test \
         abi`"
    );
}
