//! Tasks and counters of a persistent step, and the order that they make.
//!
//! Tasks of a block run in the order of the list. Tasks that are tiles of one computation (same kernel, same places)
//! form a unit: memory is checked between units.

use std::collections::BTreeMap;

use super::MAX_CLOCKS;
use crate::codec;
use crate::plan::{Counter, Task};

/// Happens-before between the units of a persistent step.
pub(super) struct TaskOrder {
    pub(super) units: Vec<Unit>,
}

/// Tiles of one computation.
pub(super) struct Unit {
    /// A task of it: its places are the unit's.
    pub(super) task: usize,
    /// Per block, how many of the block's tasks are over when all of the unit's are.
    end: Vec<u32>,
    /// Per block, how many of the block's tasks are over when the first of the unit's starts.
    start: Vec<u32>,
}

impl TaskOrder {
    /// Checks counters and finds the order of tasks.
    ///
    /// # Errors
    /// A counter out of range or with a threshold that is not the number of its signals, a cycle of waits, or tiles
    /// that overlap.
    pub(super) fn new(tasks: &[Task], counters: &[Counter]) -> Result<Self, String> {
        let signallers = check_counters(tasks, counters)?;
        let schedule = Schedule::new(tasks, &signallers)?;
        Ok(Self { units: units(tasks, &schedule)? })
    }

    /// Whether all of unit `a` is over when the first of `b` starts.
    pub(super) fn ordered(&self, a: usize, b: usize) -> bool {
        let (a, b) = (&self.units[a], &self.units[b]);
        a.end.iter().zip(&b.start).all(|(end, start)| end <= start)
    }
}

/// For each counter, the tasks that raise it.
fn check_counters(tasks: &[Task], counters: &[Counter]) -> Result<Vec<Vec<usize>>, String> {
    let mut signallers = vec![Vec::new(); counters.len()];
    for (number, task) in tasks.iter().enumerate() {
        for &counter in &task.signals {
            let found: Option<&mut Vec<usize>> = signallers.get_mut(counter as usize);
            let found =
                found.ok_or_else(|| format!("task {number} signals counter {counter} of {}", counters.len()))?;
            if found.last() == Some(&number) {
                return Err(format!("task {number} signals counter {counter} twice"));
            }
            found.push(number);
        }
        if let Some(counter) = task.waits.iter().find(|&&counter| counter as usize >= counters.len()) {
            return Err(format!("task {number} waits for counter {counter} of {}", counters.len()));
        }
    }
    for (number, (counter, signallers)) in counters.iter().zip(&signallers).enumerate() {
        if counter.threshold as usize != signallers.len() {
            let (threshold, signals) = (counter.threshold, signallers.len());
            return Err(format!("counter {number} has threshold {threshold} and {signals} signals"));
        }
    }
    Ok(signallers)
}

struct Schedule {
    /// Tasks in an order that waits allow.
    order: Vec<usize>,
    blocks: usize,
    /// Dense number of each task's block, and its position there.
    place: Vec<(usize, u32)>,
    /// Per task and block: tasks of the block that are over when the task starts.
    clocks: Vec<u32>,
}

impl Schedule {
    fn new(tasks: &[Task], signallers: &[Vec<usize>]) -> Result<Self, String> {
        let mut numbers = BTreeMap::new();
        let mut queues: Vec<Vec<usize>> = Vec::new();
        let mut place = Vec::with_capacity(tasks.len());
        for (number, task) in tasks.iter().enumerate() {
            let block = *numbers.entry(task.block).or_insert(queues.len());
            if block == queues.len() {
                queues.push(Vec::new());
            }
            place.push((block, queues[block].len() as u32));
            queues[block].push(number);
        }
        let blocks = queues.len();
        if tasks.len().max(signallers.len()).saturating_mul(blocks) > MAX_CLOCKS {
            return Err(format!("{} tasks and {} counters on {blocks} blocks", tasks.len(), signallers.len()));
        }
        let mut schedule = Self { order: Vec::new(), blocks, place, clocks: vec![0; tasks.len() * blocks] };
        schedule.run(tasks, signallers, &queues)?;
        Ok(schedule)
    }

    /// Runs tasks as their counters allow, keeping clocks.
    fn run(&mut self, tasks: &[Task], signallers: &[Vec<usize>], queues: &[Vec<usize>]) -> Result<(), String> {
        let mut missing: Vec<usize> = signallers.iter().map(Vec::len).collect();
        let mut reached: Vec<Vec<u32>> = vec![vec![0; self.blocks]; missing.len()];
        let mut waiting: Vec<Vec<usize>> = vec![Vec::new(); missing.len()];
        let mut next = vec![0; self.blocks];
        let mut ready: Vec<usize> = (0..self.blocks).rev().collect();
        while let Some(block) = ready.pop() {
            while let Some(&task) = queues[block].get(next[block]) {
                if let Some(&counter) = tasks[task].waits.iter().find(|&&counter| missing[counter as usize] > 0) {
                    waiting[counter as usize].push(block);
                    break;
                }
                let mut clock = vec![0; self.blocks];
                if let Some(before) = next[block].checked_sub(1) {
                    let before = queues[block][before] * self.blocks;
                    clock.copy_from_slice(&self.clocks[before..before + self.blocks]);
                }
                clock[block] = next[block] as u32;
                for &counter in &tasks[task].waits {
                    join(&mut clock, &reached[counter as usize]);
                }
                self.clocks[task * self.blocks..(task + 1) * self.blocks].copy_from_slice(&clock);
                self.order.push(task);
                next[block] += 1;
                clock[block] = next[block] as u32;
                for &counter in &tasks[task].signals {
                    join(&mut reached[counter as usize], &clock);
                    missing[counter as usize] -= 1;
                    if missing[counter as usize] == 0 {
                        ready.append(&mut waiting[counter as usize]);
                    }
                }
            }
        }
        match (0..self.blocks).find(|&block| next[block] < queues[block].len()) {
            Some(block) => Err(format!("cycle of waits: task {} never starts", queues[block][next[block]])),
            None => Ok(()),
        }
    }
}

fn join(clock: &mut [u32], other: &[u32]) {
    for (mine, theirs) in clock.iter_mut().zip(other) {
        *mine = (*mine).max(*theirs);
    }
}

/// Groups tasks into units, in an order that waits allow.
fn units(tasks: &[Task], schedule: &Schedule) -> Result<Vec<Unit>, String> {
    let mut known: BTreeMap<Vec<u8>, usize> = BTreeMap::new();
    let mut units: Vec<Unit> = Vec::new();
    let mut tiles: Vec<Vec<(u32, u32)>> = Vec::new();
    for &number in &schedule.order {
        let task = &tasks[number];
        let key = codec::encode(&(task.kernel, &task.operands, &task.results))?;
        let clock = &schedule.clocks[number * schedule.blocks..(number + 1) * schedule.blocks];
        let (block, position) = schedule.place[number];
        let unit = *known.entry(key).or_insert(units.len());
        if unit == units.len() {
            units.push(Unit { task: number, end: vec![0; schedule.blocks], start: vec![u32::MAX; schedule.blocks] });
            tiles.push(Vec::new());
        }
        tiles[unit].push(task.tiles);
        let unit = &mut units[unit];
        unit.end[block] = unit.end[block].max(position + 1);
        for (start, now) in unit.start.iter_mut().zip(clock) {
            *start = (*start).min(*now);
        }
    }
    for (unit, tiles) in units.iter().zip(&mut tiles) {
        tiles.sort_unstable();
        let disjoint = tiles.windows(2).all(|pair| pair[0].1 <= pair[1].0);
        if !disjoint || tiles.iter().any(|tiles| tiles.0 >= tiles.1) {
            return Err(format!("tiles of the tasks like task {} are empty or overlap", unit.task));
        }
    }
    Ok(units)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    fn task(block: u32, offset: u64, tiles: (u32, u32), waits: &[u32], signals: &[u32]) -> Task {
        Task {
            kernel: 0,
            block,
            tiles,
            operands: vec![],
            results: vec![sample::at(offset, &[4])],
            waits: waits.to_vec(),
            signals: signals.to_vec(),
        }
    }

    #[test]
    fn counters_order_units_across_blocks() {
        let tasks = [
            task(0, 0, (0, 1), &[], &[0]),
            task(1, 0, (1, 2), &[], &[0]),
            task(1, 256, (0, 1), &[0], &[]),
            task(0, 512, (0, 1), &[], &[]),
        ];
        let order = TaskOrder::new(&tasks, &[Counter { threshold: 2 }]).unwrap();
        let unit = |task: usize| order.units.iter().position(|unit| unit.task == task).unwrap();
        assert_eq!(order.units.len(), 3);
        assert!(order.ordered(unit(0), unit(2)));
        assert!(!order.ordered(unit(2), unit(0)));
        // Follows the first tile on its block, but not the second.
        assert!(!order.ordered(unit(0), unit(3)));
    }

    #[test]
    fn wrong_counters_are_refused() {
        let refused = |tasks: &[Task], thresholds: &[u32]| {
            let counters: Vec<Counter> = thresholds.iter().map(|&threshold| Counter { threshold }).collect();
            TaskOrder::new(tasks, &counters).err().unwrap()
        };
        let one = || task(0, 0, (0, 1), &[], &[0]);
        assert_eq!(refused(&[one()], &[2]), "counter 0 has threshold 2 and 1 signals");
        assert_eq!(refused(&[one()], &[]), "task 0 signals counter 0 of 0");
        assert_eq!(refused(&[task(0, 0, (0, 1), &[3], &[])], &[0]), "task 0 waits for counter 3 of 1");
        assert_eq!(refused(&[task(0, 0, (0, 1), &[], &[0, 0])], &[2]), "task 0 signals counter 0 twice");
        let cycle = [task(0, 0, (0, 1), &[1], &[0]), task(1, 256, (0, 1), &[0], &[1])];
        assert_eq!(refused(&cycle, &[1, 1]), "cycle of waits: task 0 never starts");
        let tiles = [task(0, 0, (0, 2), &[], &[]), task(1, 0, (1, 2), &[], &[])];
        assert_eq!(refused(&tiles, &[]), "tiles of the tasks like task 0 are empty or overlap");
    }
}
