//! Real groups on 127.0.0.1, each rank a thread with connections of its own.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use data_parallel::{Backend, Error, Options, ProcessGroup, Ranks, Result};

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn options() -> Options {
    Options {
        timeout: Duration::from_secs(20),
        ..Options::default()
    }
}

fn connect(rank: usize, world_size: usize, port: u16) -> Result<ProcessGroup> {
    let ranks = Ranks::new(rank, world_size, "127.0.0.1", port)?;
    ProcessGroup::connect(&ranks, &options(), Backend::Tcp)
}

/// What each rank makes of `work`, by rank.
fn on_ranks<T: Send>(world_size: usize, work: impl Fn(ProcessGroup) -> T + Sync) -> Vec<T> {
    let port = free_port();
    thread::scope(|scope| {
        let rank = |rank| {
            let work = &work;
            scope.spawn(move || work(connect(rank, world_size, port).unwrap()))
        };
        let threads: Vec<_> = (0..world_size).map(rank).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

/// Not symmetric, with fractions, different on each rank.
fn value(rank: usize, index: usize) -> f32 {
    ((index * 7 + rank * 13) % 31) as f32 * 0.37 - 3.0 + rank as f32
}

fn values(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|index| value(rank, index)).collect()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

#[test]
fn sums_of_awkward_sizes_are_right_and_the_same_bits_on_all_ranks() {
    // Fewer values than ranks, no multiple of them, more than fits into the system's buffers.
    let shapes: [&[usize]; 6] = [&[1], &[0], &[2, 3], &[], &[1021], &[700, 1001]];
    for world_size in 1..=4 {
        let weight = |rank: usize| (rank + 1) as f64 / 8.0;
        let reduced = on_ranks(world_size, |group| {
            let tensors: Vec<Tensor> = shapes
                .iter()
                .map(|&shape| {
                    let len = shape.iter().product();
                    Tensor::from_vec(values(group.rank(), len), shape, &Device::Cpu).unwrap()
                })
                .collect();
            let sums = group
                .all_reduce_weighted(&tensors, weight(group.rank()))
                .unwrap();
            assert!(
                sums.iter()
                    .zip(shapes)
                    .all(|(sum, shape)| sum.dims() == shape)
            );
            sums.iter().map(bits).collect::<Vec<_>>()
        });
        for rank in &reduced {
            assert!(
                *rank == reduced[0],
                "the ranks of {world_size} have different bits"
            );
        }
        for (sum, shape) in reduced[0].iter().zip(shapes) {
            assert_eq!(sum.len(), shape.iter().product::<usize>());
            for (index, &sum) in sum.iter().enumerate() {
                let terms = (0..world_size).map(|r| f64::from(value(r, index)) * weight(r));
                let error = (f64::from(f32::from_bits(sum)) - terms.sum::<f64>()).abs();
                assert!(
                    error < 1e-5,
                    "{world_size} ranks, {shape:?}, value {index}: {error}"
                );
            }
        }
    }
}

#[test]
fn the_same_sums_have_the_same_bits_every_time() {
    let once = || {
        on_ranks(3, |group| {
            // Out of step on purpose: timing must not show in the result.
            thread::sleep(Duration::from_millis(20 * group.rank() as u64));
            let tensor = Tensor::from_vec(values(group.rank(), 5000), 5000, &Device::Cpu).unwrap();
            bits(&group.all_reduce_mean(&[tensor]).unwrap()[0])
        })
    };
    assert_eq!(once(), once());
}

#[test]
fn counters_add_up_and_bytes_of_rank_0_reach_all() {
    for world_size in 1..=4 {
        let results = on_ranks(world_size, |group| {
            let rank = group.rank() as u64;
            let mut counters = [1, rank, u64::MAX / 8];
            group.all_reduce_sum(&mut counters).unwrap();
            let mut sums = [0.1 * rank as f64];
            group.all_reduce_sum_f64(&mut sums).unwrap();
            group.barrier().unwrap();
            let mine = vec![rank as u8 + 1; 300_000];
            let bytes = group.broadcast(mine).unwrap();
            assert_eq!(bytes, vec![1; 300_000]);
            assert!(group.broadcast(Vec::new()).unwrap().is_empty());
            (counters, sums[0].to_bits())
        });
        let n = world_size as u64;
        let in_order: f64 = (0..n).map(|rank| 0.1 * rank as f64).sum();
        let expected = [n, n * (n - 1) / 2, n * (u64::MAX / 8)];
        assert_eq!(results, vec![(expected, in_order.to_bits()); world_size]);
    }
}

#[test]
fn a_rank_that_ends_is_an_error_on_all_others_at_once() {
    for dying in 0..5 {
        let begin = Instant::now();
        let errors = on_ranks(5, |group| {
            // So long that a rank is in the middle of a message when it hears of it.
            let tensor = Tensor::zeros(5_000_000, DType::F32, &Device::Cpu).unwrap();
            group.barrier().unwrap();
            if group.rank() == dying {
                return None;
            }
            let failed =
                (0..10).find_map(|_| group.all_reduce_mean(std::slice::from_ref(&tensor)).err());
            let error = failed.expect("the group must not go on");
            // The group stays unusable.
            assert!(matches!(group.barrier(), Err(Error::Failed(_))));
            Some(error.to_string())
        });
        for (rank, error) in errors.iter().enumerate().filter(|(rank, _)| *rank != dying) {
            let error = error.as_ref().unwrap();
            let lost = format!("lost rank {dying} ");
            assert!(error.contains(&lost), "rank {rank}: {error}");
        }
        assert!(
            begin.elapsed() < Duration::from_secs(10),
            "{:?}",
            begin.elapsed()
        );
    }
}

#[test]
fn the_reason_for_giving_up_reaches_every_rank() {
    let errors = on_ranks(4, |group| {
        if group.rank() == 2 {
            group.give_up("the disk is full");
            return "the disk is full".to_string();
        }
        let tensor = Tensor::zeros(10, DType::F32, &Device::Cpu).unwrap();
        group.all_reduce_mean(&[tensor]).unwrap_err().to_string()
    });
    for (rank, error) in errors.iter().enumerate().filter(|(rank, _)| *rank != 2) {
        assert_eq!(error, "rank 2 gave up: the disk is full", "rank {rank}");
    }
}

#[test]
fn what_one_rank_cannot_reduce_ends_the_call_of_all() {
    let errors = on_ranks(3, |group| {
        let dtype = match group.rank() {
            1 => DType::F64,
            _ => DType::F32,
        };
        let tensor = Tensor::zeros(10, dtype, &Device::Cpu).unwrap();
        group.all_reduce_mean(&[tensor]).unwrap_err().to_string()
    });
    let [first, unsupported, last] = &errors[..] else {
        panic!("{errors:?}");
    };
    assert!(
        unsupported.contains("only F32 can be reduced"),
        "{unsupported}"
    );
    let heard = format!("rank 1 gave up: {unsupported}");
    assert_eq!([first, last], [&heard; 2]);
}

#[test]
fn a_silent_rank_is_an_error_after_the_timeout() {
    let port = free_port();
    let connect = move |rank| {
        let ranks = Ranks::new(rank, 2, "127.0.0.1", port).unwrap();
        let options = Options {
            // The meeting of the ranks has to end within it too.
            timeout: Duration::from_secs(5),
            ..Options::default()
        };
        ProcessGroup::connect(&ranks, &options, Backend::Tcp).unwrap()
    };
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let silent = thread::spawn(move || {
        let group = connect(1);
        let _ = wait.recv();
        drop(group);
    });
    let error = connect(0).barrier().unwrap_err().to_string();
    drop(done);
    silent.join().unwrap();
    assert_eq!(
        error,
        "rank 1 did not answer for 5 s during the sum of counters"
    );
}

/// What rank 0 hears while its device waits for rank 1, which does `ending`.
fn while_waiting(ending: impl Fn(ProcessGroup) + Sync, timeout: Duration) -> String {
    let port = free_port();
    let connect = |rank, timeout| {
        let ranks = Ranks::new(rank, 2, "127.0.0.1", port).unwrap();
        let options = Options {
            timeout,
            ..Options::default()
        };
        ProcessGroup::connect(&ranks, &options, Backend::Tcp).unwrap()
    };
    thread::scope(|scope| {
        scope.spawn(|| ending(connect(1, Duration::from_secs(60))));
        let group = connect(0, timeout);
        let waited = group.wait_until(|| Ok::<_, Error>(false));
        assert!(matches!(group.barrier(), Err(Error::Failed(_))));
        waited.unwrap_err().to_string()
    })
}

#[test]
fn a_device_that_waits_for_a_rank_that_is_gone_is_waited_for_no_longer() {
    let long = Duration::from_secs(60);
    let lost = while_waiting(drop, long);
    assert!(lost.contains("lost rank 1 during the all-reduce"), "{lost}");
    let gave_up = while_waiting(|group| group.give_up("the disk is full"), long);
    assert_eq!(gave_up, "rank 1 gave up: the disk is full");
}

#[test]
fn a_device_that_does_not_get_on_is_given_up_after_the_timeout() {
    // A rank that is there and does not help; it hears of the end.
    let hangs = |group: ProcessGroup| drop(group.barrier());
    let error = while_waiting(hangs, Duration::from_secs(5));
    assert!(error.contains("did not end within 5 s"), "{error}");
}

#[test]
fn a_rank_that_is_ahead_is_no_reason_to_stop_waiting() {
    let sums = on_ranks(2, |group| {
        if group.rank() == 0 {
            let end = Instant::now() + Duration::from_millis(200);
            let is_done = || Ok::<_, Error>(Instant::now() > end);
            group.wait_until(is_done).unwrap();
        }
        let mut sum = [1];
        group.all_reduce_sum(&mut sum).unwrap();
        sum[0]
    });
    assert_eq!(sums, [2, 2]);
}

#[test]
fn ranks_that_make_different_calls_or_sizes_are_told_so() {
    let errors = on_ranks(2, |group| match group.rank() {
        0 => group.barrier().unwrap_err().to_string(),
        _ => group.all_reduce_sum(&mut [1, 2]).unwrap_err().to_string(),
    });
    assert!(
        errors[0].contains("rank 1 is at the sum of counters of 16 bytes"),
        "{errors:?}"
    );
    assert!(
        errors[1].contains("rank 0 gave up: rank 1 is at"),
        "{errors:?}"
    );
}

/// The errors of ranks that cannot become a group, by position.
fn refused(
    ranks: &[(usize, usize)],
    facts: impl Fn(usize) -> BTreeMap<String, String> + Sync,
) -> Vec<String> {
    let port = free_port();
    thread::scope(|scope| {
        let connect = |(position, &(rank, world_size))| {
            let facts = facts(position);
            scope.spawn(move || {
                let ranks = Ranks::new(rank, world_size, "127.0.0.1", port).unwrap();
                let options = Options {
                    timeout: Duration::from_secs(3),
                    facts,
                };
                let group = ProcessGroup::connect(&ranks, &options, Backend::Tcp);
                group.expect_err("they do not fit").to_string()
            })
        };
        let threads: Vec<_> = ranks.iter().enumerate().map(connect).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

#[test]
fn different_settings_are_refused_by_name_on_both_sides() {
    let errors = refused(&[(0, 2), (1, 2)], |rank| {
        let lr = ["0.1", "0.2"][rank];
        BTreeMap::from([("lr".into(), lr.into()), ("epochs".into(), "3".into())])
    });
    let expected = "the ranks do not run the same: lr is 0.2 at rank 1, 0.1 at rank 0";
    assert_eq!(errors[0], expected);
    assert_eq!(errors[1], format!("rank 0 gave up: {expected}"));
}

#[test]
fn different_world_sizes_are_refused() {
    let errors = refused(&[(0, 2), (1, 3)], |_| BTreeMap::new());
    let expected = "WORLD_SIZE is 3 at rank 1, 2 at rank 0";
    assert!(
        errors.iter().all(|error| error.contains(expected)),
        "{errors:?}"
    );
}

#[test]
fn a_rank_that_is_there_twice_is_refused() {
    let errors = refused(&[(0, 3), (1, 3), (1, 3)], |_| BTreeMap::new());
    let expected = "another process has this RANK";
    assert!(
        errors.iter().all(|error| error.contains(expected)),
        "{errors:?}"
    );
}

#[test]
fn missing_ranks_are_named() {
    let errors = refused(&[(0, 4), (2, 4)], |_| BTreeMap::new());
    let expected = "ranks [1, 3] of 4 did not connect within 3 s";
    assert_eq!(errors[0], expected);
}

#[test]
fn without_rank_0_the_others_say_where_they_sought_it() {
    let errors = refused(&[(1, 2)], |_| BTreeMap::new());
    assert!(
        errors[0].contains("could not reach rank 0 at 127.0.0.1:"),
        "{errors:?}"
    );
}

#[test]
fn a_port_in_use_is_an_error_that_names_it() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let error = connect(0, 2, port).unwrap_err();
    assert!(matches!(error, Error::Listen { .. }));
    assert!(
        error
            .to_string()
            .contains(&format!("cannot listen on 127.0.0.1:{port}"))
    );
}

#[test]
fn strangers_at_the_meeting_place_are_ignored() {
    let port = free_port();
    let first = thread::spawn(move || connect(0, 2, port).unwrap().barrier());
    let mut stranger = reach(port);
    // A web client, which also states an absurd length where ours would be.
    stranger
        .write_all(b"GET / HTTP/1.1\r\nHost: \xff\xff\xff\xff\xff\xff\xff\xff\r\n\r\n")
        .unwrap();
    connect(1, 2, port).unwrap().barrier().unwrap();
    first.join().unwrap().unwrap();
}

/// A connection to rank 0, as soon as it listens.
fn reach(port: u16) -> TcpStream {
    loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => return stream,
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// As of two machines, where rank 0's name means an address of its own loopback to itself and another one to the other.
#[cfg(target_os = "linux")]
#[test]
fn rank_0_is_found_where_its_name_means_loopback_to_itself() {
    let join = |(rank, master_addr): (usize, &'static str), port, on_one_machine: bool| {
        thread::spawn(move || {
            let mut ranks = Ranks::new(rank, 3, master_addr, port).unwrap();
            if !on_one_machine {
                (ranks.local_rank, ranks.local_world_size) = (0, 1);
            }
            let group = ProcessGroup::connect(&ranks, &options(), Backend::Tcp).unwrap();
            let tensor = Tensor::full(rank as f32, 2000, &Device::Cpu).unwrap();
            bits(&group.all_reduce_weighted(&[tensor], 1.0).unwrap()[0])
        })
    };
    let apart = [(0, "127.0.1.1"), (1, "127.0.0.1"), (2, "127.0.0.3")];
    // On one machine all know it by one name, and listen there alone.
    let together = [0, 1, 2].map(|rank| (rank, "127.0.1.1"));
    for (places, on_one_machine) in [(apart, false), (together, true)] {
        let port = free_port();
        for rank in places.map(|place| join(place, port, on_one_machine)) {
            assert_eq!(rank.join().unwrap(), vec![3f32.to_bits(); 2000]);
        }
    }
}

#[test]
fn a_slow_stranger_holds_nobody_up() {
    let port = free_port();
    let first = thread::spawn(move || connect(0, 2, port).unwrap().barrier());
    let mut stranger = reach(port);
    // A byte a second would keep one alive whose patience begins anew with each.
    let begin = Instant::now();
    let slow = thread::spawn(move || {
        while stranger.write_all(b"\x01").is_ok() && begin.elapsed() < Duration::from_secs(30) {
            thread::sleep(Duration::from_secs(1));
        }
    });
    connect(1, 2, port).unwrap().barrier().unwrap();
    first.join().unwrap().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(15));
    slow.join().unwrap();
}

#[test]
fn silent_strangers_hold_nobody_up() {
    let port = free_port();
    let timeout = Duration::from_secs(4); // less than one stranger is heard
    let connect = move |rank| {
        let ranks = Ranks::new(rank, 3, "127.0.0.1", port).unwrap();
        let options = Options {
            timeout,
            ..Options::default()
        };
        ProcessGroup::connect(&ranks, &options, Backend::Tcp)
    };
    let first = thread::spawn(move || connect(0).unwrap().barrier());
    let strangers = [(); 6].map(|()| reach(port));
    let others = [1, 2].map(|rank| thread::spawn(move || connect(rank).unwrap().barrier()));
    first.join().unwrap().unwrap();
    for rank in others {
        rank.join().unwrap().unwrap();
    }
    drop(strangers);
}

#[test]
fn another_program_in_the_place_of_rank_0_is_told_from_a_rank_out_of_step() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream
            .write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
            .unwrap();
        stream
    });
    let ranks = Ranks::new(1, 2, "127.0.0.1", port).unwrap();
    let error = ProcessGroup::connect(&ranks, &Options::default(), Backend::Tcp).unwrap_err();
    drop(server.join().unwrap());
    assert_eq!(
        error.to_string(),
        format!(
            "what listens at 127.0.0.1:{port} does not belong to this group: it speaks another protocol"
        )
    );
}

#[test]
fn of_many_ranks_that_do_not_come_the_first_are_named() {
    let missing = |count: usize| Error::Missing {
        missing: (1..=count).collect(),
        world_size: 30,
        timeout: Duration::from_secs(1),
    };
    let few = "ranks [1, 2] of 30 did not connect within 1 s";
    assert_eq!(missing(2).to_string(), few);
    let many = "ranks [1, 2, 3, 4, 5, 6, 7, 8] and 21 more of 30 did not connect within 1 s";
    assert_eq!(missing(29).to_string(), many);
}

#[test]
fn silent_strangers_do_not_put_off_the_end_of_the_wait() {
    let port = free_port();
    let first = thread::spawn(move || {
        let ranks = Ranks::new(0, 2, "127.0.0.1", port).unwrap();
        let options = Options {
            timeout: Duration::from_secs(2),
            ..Options::default()
        };
        let begin = Instant::now();
        let error = ProcessGroup::connect(&ranks, &options, Backend::Tcp).unwrap_err();
        (error, begin.elapsed())
    });
    let strangers = [(); 6].map(|()| reach(port));
    let (error, waited) = first.join().unwrap();
    drop(strangers);
    assert!(matches!(error, Error::Missing { .. }), "{error}");
    assert!(waited < Duration::from_secs(4), "{waited:?}");
}

#[test]
fn settings_can_be_compared_later_too() {
    let errors = on_ranks(3, |group| {
        let facts = |data: &str| BTreeMap::from([("data".to_string(), data.to_string())]);
        group.verify_same(&facts("a")).unwrap();
        let data = if group.rank() == 1 { "b" } else { "a" };
        group.verify_same(&facts(data)).unwrap_err().to_string()
    });
    let expected = "data is b at rank 1, a at rank 0";
    assert!(
        errors.iter().all(|error| error.contains(expected)),
        "{errors:?}"
    );
}

#[test]
fn only_f32_can_be_reduced() {
    let tensor = Tensor::zeros(3, DType::F64, &Device::Cpu).unwrap();
    let group = connect(0, 1, 1).unwrap();
    let error = group.all_reduce_mean(&[tensor]).unwrap_err().to_string();
    assert_eq!(error, "a tensor of F64; only F32 can be reduced");
}
