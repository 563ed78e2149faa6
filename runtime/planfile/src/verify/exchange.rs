//! Sends and receives between the programs of an entry: each has its counterpart, and nobody waits for ever.
//!
//! Whether somebody does is found by running the waits alone, twice. On devices, streams run beside one another and a
//! send is over when it was received. On the host, a rank takes its steps one by one and sends do not wait. A plan must
//! end both ways. Collectives of a program are met by all its ranks in the same order, as they all run the same steps.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::Report;
use crate::op::Op;
use crate::plan::{Action, Plan, PlanEntry, Program, Step};
use crate::types::TensorType;

/// Most pairs of ranks that [`check_links`] looks at.
const MAX_PAIRS: usize = 1 << 26;

/// Links are those of ranks that exchange data, each once; or none, of a machine whose links are not described.
pub(super) fn check_links(plan: &Plan, report: &mut Report) {
    let links = &plan.manifest.links;
    if links.is_empty() {
        return;
    }
    let mut missing: BTreeSet<(u32, u32)> = BTreeSet::new();
    for (number, pair) in plan.programs.iter().flat_map(Program::exchanging).enumerate() {
        missing.insert(pair);
        if missing.len() > links.len() || number == MAX_PAIRS {
            let count = links.len();
            return report.add("manifest", format!("{count} links for more than {count} pairs of ranks that exchange"));
        }
    }
    for link in links {
        report.require(missing.remove(&link.ranks) && !link.class.is_empty(), "manifest", || {
            format!("link of class `{}` between {:?}, which do not exchange", link.class, link.ranks)
        });
    }
    if let Some(pair) = missing.first() {
        report.add("manifest", format!("no link between {pair:?}, which exchange"));
    }
}

/// A step of the entry: position of the program in the entry, and of the step.
type Node = (usize, usize);

pub(super) fn check(plan: &Plan, entry: &PlanEntry, report: &mut Report) {
    let programs: Vec<&Program> =
        entry.programs.iter().filter_map(|&program| plan.programs.get(program as usize)).collect();
    let at = format_args!("entry `{}`", entry.name);
    match pair(&programs) {
        Err(what) => report.add(at, what),
        Ok(pairs) => {
            for way in [Way::Devices, Way::Host] {
                let stuck = Run::new(&programs, &pairs, way).stuck();
                if !stuck.is_empty() {
                    report.add(at, format!("cycle of waits: {}", explain(&programs, &stuck)));
                    break;
                }
            }
        }
    }
}

fn explain(programs: &[&Program], stuck: &[(Node, Node)]) -> String {
    let name = |node: &Node| {
        let step = &programs[node.0].steps[node.1];
        let what = match channel(step) {
            Some((Side::Send, channel)) => format!(" (send on channel {channel})"),
            Some((Side::Recv, channel)) => format!(" (receive on channel {channel})"),
            None => String::new(),
        };
        format!("stage {} step #{}{what}", node.0, node.1)
    };
    let shown = stuck.iter().take(4).map(|(step, awaited)| format!("{} waits for {}", name(step), name(awaited)));
    shown.collect::<Vec<_>>().join("; ")
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Send,
    Recv,
}

fn channel(step: &Step) -> Option<(Side, u32)> {
    match &step.action {
        Action::Collective { op: Op::Send { channel, .. }, .. } => Some((Side::Send, *channel)),
        Action::Collective { op: Op::Recv { channel, .. }, .. } => Some((Side::Recv, *channel)),
        _ => None,
    }
}

/// Peers and type of a send or receive.
fn terms(step: &Step) -> Option<(&[u32], &TensorType)> {
    match &step.action {
        Action::Collective { op: Op::Send { peers, .. }, operands, .. } => Some((peers, &operands.first()?.ty)),
        Action::Collective { op: Op::Recv { peers, ty, .. }, .. } => Some((peers, ty)),
        _ => None,
    }
}

/// For each send its receive, and the other way round.
fn pair(programs: &[&Program]) -> Result<BTreeMap<Node, Node>, String> {
    let mut channels: BTreeMap<u32, [Option<Node>; 2]> = BTreeMap::new();
    for (program, steps) in programs.iter().map(|program| &program.steps).enumerate() {
        for (position, step) in steps.iter().enumerate() {
            if let Some((side, channel)) = channel(step) {
                let ends = channels.entry(channel).or_default();
                if ends[side as usize].replace((program, position)).is_some() {
                    return Err(format!("channel {channel} is used twice on one side"));
                }
            }
        }
    }
    let mut pairs = BTreeMap::new();
    for (channel, ends) in channels {
        let [Some(send), Some(recv)] = ends else {
            let missing = if ends[Side::Send as usize].is_none() { "send" } else { "receive" };
            return Err(format!("channel {channel} has no {missing}"));
        };
        check_pair(programs, send, recv).map_err(|what| format!("channel {channel}: {what}"))?;
        pairs.insert(send, recv);
        pairs.insert(recv, send);
    }
    Ok(pairs)
}

fn check_pair(programs: &[&Program], send: Node, recv: Node) -> Result<(), String> {
    let (from, to) = (programs[send.0], programs[recv.0]);
    let (Some((receivers, sent)), Some((senders, received))) = (terms(&from.steps[send.1]), terms(&to.steps[recv.1]))
    else {
        return Err("is no exchange".to_owned());
    };
    if sent != received {
        return Err(format!("sends {sent}, receives {received}"));
    }
    // Each side's table has one entry per rank.
    let agree = |mine: &Program, peers: &[u32], theirs: &Program, back: &[u32]| {
        mine.ranks.iter().zip(peers).all(|(rank, peer)| {
            let position = theirs.ranks.binary_search(peer).ok();
            position.and_then(|position| back.get(position)) == Some(rank)
        })
    };
    let fine = agree(from, receivers, to, senders) && agree(to, senders, from, receivers);
    fine.then_some(()).ok_or_else(|| format!("sent to {receivers:?}, received from {senders:?}"))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Devices,
    Host,
}

/// The waits of an entry's programs, running.
struct Run<'a> {
    programs: &'a [&'a Program],
    pairs: &'a BTreeMap<Node, Node>,
    way: Way,
    /// Per program and queue, the steps in it.
    queues: Vec<Vec<Vec<usize>>>,
    /// Per program and queue, how many steps are over.
    next: Vec<Vec<usize>>,
    over: Vec<Vec<bool>>,
    /// Sends and receives that have begun.
    begun: BTreeMap<Node, ()>,
    /// Queues to look at again when a step is over.
    waiting: BTreeMap<Node, Vec<(usize, usize)>>,
}

impl<'a> Run<'a> {
    fn new(programs: &'a [&'a Program], pairs: &'a BTreeMap<Node, Node>, way: Way) -> Self {
        let queue = |program: &&Program| {
            let mut queues = vec![Vec::new(); if way == Way::Devices { program.streams as usize } else { 1 }];
            for (position, step) in program.steps.iter().enumerate() {
                let queue = if way == Way::Devices { step.stream as usize } else { 0 };
                queues[queue].push(position);
            }
            queues
        };
        let queues: Vec<Vec<Vec<usize>>> = programs.iter().map(queue).collect();
        Self {
            programs,
            pairs,
            way,
            next: queues.iter().map(|queues| vec![0; queues.len()]).collect(),
            over: programs.iter().map(|program| vec![false; program.steps.len()]).collect(),
            queues,
            begun: BTreeMap::new(),
            waiting: BTreeMap::new(),
        }
    }

    /// Runs until nothing moves; what then waits, and for what.
    fn stuck(mut self) -> Vec<(Node, Node)> {
        let all = |(program, queues): (usize, &Vec<Vec<usize>>)| (0..queues.len()).map(move |queue| (program, queue));
        let mut ready: VecDeque<(usize, usize)> = self.queues.iter().enumerate().flat_map(all).collect();
        let mut blocked = BTreeMap::new();
        while let Some((program, queue)) = ready.pop_front() {
            blocked.remove(&(program, queue));
            while let Some(&position) = self.queues[program][queue].get(self.next[program][queue]) {
                let node = (program, position);
                if let Some(awaited) = self.advance(node, &mut ready) {
                    self.waiting.entry(awaited).or_default().push((program, queue));
                    blocked.insert((program, queue), (node, awaited));
                    break;
                }
                self.next[program][queue] += 1;
            }
        }
        blocked.into_values().collect()
    }

    /// Finishes a step, or says what it waits for.
    fn advance(&mut self, node: Node, ready: &mut VecDeque<(usize, usize)>) -> Option<Node> {
        let (program, position) = node;
        if self.over[program][position] {
            return None;
        }
        let step = &self.programs[program].steps[position];
        let unfinished = step.waits.iter().find(|edge| !self.over[program][edge.from as usize]);
        if let Some(edge) = unfinished {
            return Some((program, edge.from as usize));
        }
        if let Some(&other) = self.pairs.get(&node) {
            let sends = channel(step).is_some_and(|(side, _)| side == Side::Send);
            match self.way {
                Way::Host if sends => {}
                Way::Host => {
                    if !self.over[other.0][other.1] {
                        return Some(other);
                    }
                }
                Way::Devices => {
                    self.begun.insert(node, ());
                    if !self.begun.contains_key(&other) {
                        return Some(other);
                    }
                    self.finish(other, ready);
                }
            }
        }
        self.finish(node, ready);
        None
    }

    fn finish(&mut self, node: Node, ready: &mut VecDeque<(usize, usize)>) {
        self.over[node.0][node.1] = true;
        ready.extend(self.waiting.remove(&node).unwrap_or_default());
    }
}
