use super::*;

fn find(variables: &[(&str, &str)]) -> Result<Launched, String> {
    let get =
        |name: &str| variables.iter().find(|(other, _)| *other == name).map(|(_, v)| v.to_string());
    Launched::find(get, None)
}

#[test]
fn launchers_are_understood() {
    let torchrun = [
        ("RANK", "3"),
        ("WORLD_SIZE", "4"),
        ("LOCAL_RANK", "3"),
        ("LOCAL_WORLD_SIZE", "4"),
        ("MASTER_ADDR", "localhost"),
        ("MASTER_PORT", "29500"),
        ("TORCHELASTIC_RUN_ID", "none"),
        ("TORCHELASTIC_RESTART_COUNT", "0"),
    ];
    let found = find(&torchrun).unwrap();
    assert_eq!((found.rank, found.world_size), (3, 4));
    assert_eq!(found.name, "29500/localhost/none/0");
    let mpirun = [
        ("OMPI_COMM_WORLD_RANK", "1"),
        ("OMPI_COMM_WORLD_SIZE", "2"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ("PMIX_NAMESPACE", "1234"),
    ];
    let found = find(&mpirun).unwrap();
    assert_eq!((found.rank, found.world_size, found.name.as_str()), (1, 2, "1234"));
    assert_eq!(
        (found.source.as_str(), found.variable),
        ("made from PMIX_NAMESPACE", "OMPI_COMM_WORLD_RANK")
    );
    assert_eq!(found.known, Known::By("Open MPI".into(), "1234".into()));
    let mpich = [("PMI_RANK", "1"), ("PMI_SIZE", "2"), ("MPI_LOCALNRANKS", "2"), (PARENT, "77")];
    assert_eq!(find(&mpich).unwrap().name, "77");
    let mpich = [mpich[0], mpich[1], (RENDEZVOUS, "a job")];
    assert_eq!(find(&mpich).unwrap().name, "a job");
    let slurm = [
        ("SLURM_PROCID", "0"),
        ("SLURM_STEP_NUM_TASKS", "2"),
        ("SLURM_STEP_TASKS_PER_NODE", "2"),
        ("SLURM_JOB_ID", "77"),
        ("SLURM_STEP_ID", "0"),
    ];
    assert_eq!(find(&slurm).unwrap().name, "77/0");
    let pmi2 = [&slurm[..], &[("PMI_RANK", "0"), ("PMI_SIZE", "2")]].concat();
    assert_eq!(find(&pmi2).unwrap().name, "77/0");
}

#[test]
fn missing_and_contradictory_variables_are_named() {
    let error = |variables: &[(&str, &str)]| find(variables).unwrap_err();
    assert!(error(&[]).contains("RANK (torchrun)"));
    let is_there =
        |names: &[&str]| Launched::is_there(|name| names.contains(&name).then(|| "x".to_owned()));
    assert!(
        !is_there(&[])
            && !is_there(&["MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", RENDEZVOUS, PARENT])
    );
    assert!(["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"].iter().all(|rank| is_there(&[rank])));
    assert!(is_there(&["SLURM_PROCID", "SLURM_STEP_NUM_TASKS"]));
    assert!(error(&[("RANK", "0")]).contains("RANK is set, but WORLD_SIZE is not"));
    assert!(error(&[("RANK", "0"), ("WORLD_SIZE", "two")]).contains("WORLD_SIZE is \"two\""));
    assert!(error(&[("RANK", "2"), ("WORLD_SIZE", "2")]).contains("RANK is 2 and WORLD_SIZE is 2"));
    let two_hosts =
        [("RANK", "2"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2"), ("MASTER_PORT", "1")];
    assert!(error(&[("RANK", "0"), ("WORLD_SIZE", "2"), (RENDEZVOUS, "")]).contains(
        "is \
        empty"
    ));
    assert!(error(&two_hosts).contains("LOCAL_WORLD_SIZE is 2 and WORLD_SIZE is 4"));
    assert!(error(&[("RANK", "0"), ("WORLD_SIZE", "2")])
        .contains("neither MASTER_PORT nor PARAM_AVERAGER"));
    let slurm = [
        ("SLURM_PROCID", "0"),
        ("SLURM_STEP_NUM_TASKS", "4"),
        ("SLURM_STEP_TASKS_PER_NODE", "2(x2)"),
    ];
    assert!(error(&slurm).contains("SLURM_LOCALID is not"));
}

#[test]
fn ranks_of_several_hosts_are_numbered_on_each() {
    let slurm = [
        ("SLURM_PROCID", "3"),
        ("SLURM_STEP_NUM_TASKS", "4"),
        ("SLURM_STEP_TASKS_PER_NODE", "2(x2)"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_JOB_ID", "77"),
        ("SLURM_STEP_ID", "0"),
    ];
    let mpirun = [
        ("OMPI_COMM_WORLD_RANK", "3"),
        ("OMPI_COMM_WORLD_SIZE", "4"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
        ("PMIX_NAMESPACE", "1234"),
    ];
    let mpich = [
        ("PMI_RANK", "3"),
        ("PMI_SIZE", "4"),
        ("MPI_LOCALNRANKS", "2"),
        ("MPI_LOCALRANKID", "1"),
        (PARENT, "77"),
    ];
    for launched in [&slurm[..], &mpirun, &mpich] {
        let found = find(launched).unwrap();
        assert_eq!((found.rank, found.world_size, found.place.hosts), (1, 2, 2));
    }
    let with = |name: &str, value: &'static str| {
        let mut changed = slurm;
        changed.iter_mut().find(|(other, _)| *other == name).unwrap().1 = value;
        find(&changed)
    };
    // More ranks than one host can have, on many.
    let many = [("SLURM_STEP_NUM_TASKS", "65536"), ("SLURM_STEP_TASKS_PER_NODE", "16(x4096)")];
    let many = find(&[&many[..], &slurm[..1], &slurm[3..]].concat()).unwrap();
    assert_eq!((many.rank, many.world_size, many.place.hosts), (1, 16, 4096));
    let list = with("SLURM_STEP_TASKS_PER_NODE", "2,2").unwrap();
    assert_eq!((list.rank, list.world_size, list.place.hosts), (1, 2, 2));
    for unequal in ["3,1", "2,1(x2)", "1(x2),2", "2(x3)", "2(x", "3", "0", "five"] {
        let error = with("SLURM_STEP_TASKS_PER_NODE", unequal).unwrap_err();
        assert!(error.contains(unequal) && error.contains("as many on each"), "{error}");
    }
    let error = with("SLURM_STEP_TASKS_PER_NODE", "1(x4)").unwrap_err();
    assert!(error.contains("SLURM_LOCALID is 1 and"), "{error}");
}

#[test]
fn agents_of_torchrun_are_hosts_if_they_are_said_to_be() {
    let torchrun = [
        ("RANK", "5"),
        ("WORLD_SIZE", "6"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("GROUP_RANK", "2"),
        ("GROUP_WORLD_SIZE", "3"),
        ("MASTER_ADDR", "localhost"),
        ("MASTER_PORT", "29500"),
        ("TORCHELASTIC_RUN_ID", "run"),
        ("TORCHELASTIC_RESTART_COUNT", "0"),
        (hosts::HOSTS, "agents"),
    ];
    let found = find(&torchrun).unwrap();
    assert_eq!((found.rank, found.world_size), (1, 2));
    assert_eq!(found.place, HostPlace { hosts: 3, host: Some(2), run: "run".into() });
    // Agents on one machine are worlds of their own.
    assert_eq!(found.name, "29500/localhost/run/0/agent 2");
    assert_eq!(found.known, Known::By("torchrun".into(), found.name));
    // All of them are one world otherwise.
    let one = find(&torchrun[..10]).unwrap();
    assert_eq!((one.rank, one.world_size, one.place), (5, 6, HostPlace::default()));
    let elsewhere = torchrun[..10].iter().map(|&(name, value)| match name {
        "MASTER_ADDR" => (name, "far"),
        _ => (name, value),
    });
    let error = find(&elsewhere.collect::<Vec<_>>()).unwrap_err();
    assert!(error.contains("set PARAM_AVERAGER_HOSTS=agents on all of them"), "{error}");
    for (name, value, words) in [
        (hosts::HOSTS, "nodes", "is \"nodes\": set it to agents"),
        ("GROUP_RANK", "3", "agent 3 of 3: all agents must have as many ranks"),
        ("GROUP_RANK", "1", "rank 5 of 6, rank 1 of 2 of agent 1 of 3"),
        ("LOCAL_WORLD_SIZE", "3", "all agents must have as many"),
        ("LOCAL_RANK", "2", "all agents must have as many"),
        ("GROUP_WORLD_SIZE", "18446744073709551615", "all agents must have as many"),
        ("GROUP_RANK", "x", "GROUP_RANK is Some(\"x\")"),
    ] {
        let mut changed = torchrun;
        changed.iter_mut().find(|(other, _)| *other == name).unwrap().1 = value;
        let error = find(&changed).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn hosts_have_numbers_if_the_launcher_tells() {
    let host = |variables: &[(&str, &str)]| find(variables).unwrap().place.host;
    let mpirun = |rank: &'static str, local: &'static str| {
        [
            ("OMPI_COMM_WORLD_RANK", rank),
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", local),
            ("PMIX_NAMESPACE", "1234"),
        ]
    };
    // Rank 0 of --map-by node looks like that of --map-by slot.
    for (rank, local) in [("0", "0"), ("1", "1"), ("1", "0"), ("2", "0")] {
        assert_eq!(host(&mpirun(rank, local)), None);
    }
    let mpich = |local| {
        let of = [("PMI_RANK", "0"), ("PMI_SIZE", "2"), ("MPI_LOCALRANKID", "0"), (PARENT, "77")];
        host(&[&of[..], &[("MPI_LOCALNRANKS", local)]].concat())
    };
    assert_eq!([mpich("1"), mpich("2")], [None, Some(0)]);
    assert_eq!(find(&mpirun("1", "1")).unwrap().place.run, "1234");
    let srun = |node: &'static str| {
        let of = [
            ("SLURM_PROCID", "1"),
            ("SLURM_STEP_NUM_TASKS", "4"),
            ("SLURM_STEP_TASKS_PER_NODE", "2(x2)"),
            ("SLURM_LOCALID", "0"),
            ("SLURM_JOB_ID", "77"),
            ("SLURM_STEP_ID", "0"),
        ];
        find(&[&of[..], &[("SLURM_NODEID", node)]].concat()).unwrap().place
    };
    assert_eq!(srun("1"), HostPlace { hosts: 2, host: Some(1), run: "77/0".into() }); // cyclic
    assert_eq!([srun("2").host, srun("x").host], [None; 2]);
}

/// Every launcher, and both halves of each pair: never "not launched", which would train alone.
#[test]
fn half_of_a_launchers_variables_is_an_error() {
    let is_there = |variables: &[(&str, &str)]| {
        Launched::is_there(|name| {
            variables.iter().find(|(other, _)| *other == name).map(|(_, v)| v.to_string())
        })
    };
    for launcher in &LAUNCHERS {
        let Launcher { rank, world_size, local_size, .. } = *launcher;
        for (set, missing) in [(world_size, rank), (local_size, rank), (rank, world_size)] {
            let half = [(set, "1"), (RENDEZVOUS, "x"), ("MASTER_PORT", "1")];
            let error = find(&half).unwrap_err();
            let is_named = error.contains(&format!("{set} is set, but {missing} is not"));
            assert!(is_named && (is_there(&half) || error.contains("a Slurm shell")), "{error}");
        }
        // Half of torchrun's beside all of another launcher's: a script has set it for its own use.
        let whole = [(rank, "0"), (world_size, "1"), (local_size, "1"), ("SLURM_STEP_ID", "0")];
        let beside = [&whole[..], &[(RENDEZVOUS, "x"), ("WORLD_SIZE", "1")]].concat();
        assert_eq!(find(&beside).unwrap().variable, rank);
        // A name is made of whole job ids.
        let required = &launcher.job[..launcher.required];
        for missing in required.iter().filter(|_| rank != "PMI_RANK") {
            let job = required.iter().filter(|name| *name != missing).map(|name| (*name, "7"));
            let two = [(rank, "0"), (world_size, "2"), (local_size, "2")];
            let part: Vec<_> = two.into_iter().chain(job).collect();
            let error = find(&part).unwrap_err();
            assert!(error.contains(&format!("neither {missing} nor {RENDEZVOUS}")), "{error}");
        }
    }
    // A batch script of Slurm's that exports the size for the ranks that srun starts.
    let sbatch = [("SLURM_PROCID", "0"), ("SLURM_JOB_ID", "7"), ("WORLD_SIZE", "4")];
    assert!(is_there(&sbatch) && find(&sbatch).unwrap_err().contains("but RANK is not"));
}

#[test]
fn a_shell_is_no_rank() {
    let srun = [
        ("SLURM_PROCID", "0"),
        ("SLURM_STEP_NUM_TASKS", "2"),
        ("SLURM_STEP_TASKS_PER_NODE", "2"),
        ("SLURM_JOB_ID", "77"),
        ("SLURM_STEP_ID", "3"),
    ];
    let is_there = |variables: &[(&str, &str)]| {
        Launched::is_there(|name| {
            variables.iter().find(|(other, _)| *other == name).map(|(_, v)| v.to_string())
        })
    };
    let is_shell = |variables: &[(&str, &str)]| {
        let error = find(variables).map_or_else(|error| error, |_| String::new());
        assert_eq!(error.contains("not a rank"), !is_there(variables), "{error}");
        error.contains("start the ranks in it by srun")
    };
    assert!(!is_shell(&srun));
    // sbatch, an interactive step of salloc, and srun --pty are shells; ranks that srun starts
    // within the latter are not.
    let sbatch = [
        ("SLURM_PROCID", "0"),
        ("SLURM_NTASKS", "2"),
        ("SLURM_JOB_ID", "77"),
        ("SLURM_LOCALID", "0"),
    ];
    assert!(is_shell(&sbatch));
    for step in SHELLS {
        assert!(is_shell(&[&srun[..4], &[("SLURM_STEP_ID", step)]].concat()));
    }
    let pty = [("SLURM_PTY_PORT", "4711")];
    let alone = [("SLURM_STEP_NUM_TASKS", "1"), ("SLURM_STEP_TASKS_PER_NODE", "1")];
    assert!(is_shell(&[&srun[..], &pty, &[(TERMINAL, "")]].concat()));
    assert!(is_shell(&[&alone[..], &srun[..1], &srun[3..], &pty].concat()));
    assert!(!is_shell(&[&srun[..], &pty].concat()));
    // A launcher that was started in the shell takes precedence.
    let torchrun = [("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_PORT", "1")];
    assert!(!is_shell(&[&sbatch[..], &torchrun].concat()));
}

#[test]
fn agents_of_torchrun_on_one_host_are_one_world() {
    let agents = |more: &[(&str, &str)]| {
        let two =
            [("RANK", "2"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2"), ("MASTER_PORT", "1")];
        find(&[&two[..], more].concat())
    };
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    for here in [
        "localhost",
        "127.0.0.1",
        "127.3.4.5",
        "::1",
        host.trim(),
        &format!("{}.example", host.trim()),
    ] {
        assert!(agents(&[("MASTER_ADDR", here)]).is_ok(), "{here}");
    }
    for elsewhere in ["192.0.2.7", "another-host", ""] {
        let error = agents(&[("MASTER_ADDR", elsewhere)]).unwrap_err();
        assert!(
            error.contains("set MASTER_ADDR to localhost, or PARAM_AVERAGER_RENDEZVOUS"),
            "{error}"
        );
        assert_eq!(agents(&[("MASTER_ADDR", elsewhere), (RENDEZVOUS, "x")]).unwrap().name, "x");
    }
}

#[test]
fn sizes_are_those_of_a_world() {
    let of = |rank: &str, size: &str| find(&[("RANK", rank), ("WORLD_SIZE", size)]);
    let error = of("0", "17").unwrap_err();
    assert!(error.contains("WORLD_SIZE is 17: a world has 1 to 16 ranks"), "{error}");
    assert!(of("0", "0").unwrap_err().contains("WORLD_SIZE is 0"));
    // A single rank needs no port.
    let alone = of("0", "1").unwrap();
    assert!(alone.name.starts_with("alone/"), "{alone:?}");
    assert!(of("0", "2").is_err() && of("1", "1").is_err());
}

#[test]
fn a_shell_loop_is_known_by_its_process_and_torchrun_by_its_run() {
    let hand = [("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_PORT", "29500")];
    assert_eq!(find(&hand).unwrap().known, Known::No);
    let run =
        [&hand[..], &[("TORCHELASTIC_RUN_ID", "a"), ("TORCHELASTIC_RESTART_COUNT", "1")]].concat();
    assert_eq!(find(&run).unwrap().known, Known::By("torchrun".into(), "29500/a/1".into()));
    assert_eq!(find(&[&run[..], &[(RENDEZVOUS, "x")]].concat()).unwrap().known, Known::ByName);
}
