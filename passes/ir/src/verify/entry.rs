//! One entry: its signature against its stages, and the stages against each other.

use std::collections::{BTreeMap, HashMap};

use planfile::op::Op;
use planfile::{FrozenInput, TensorType};

use super::{check_type, check_whole, unique};
use crate::module::{Entry, Graph, Module, Port, ValueDef};

pub(super) fn check(module: &Module, entry: &Entry) -> Result<(), String> {
    for (what, ports) in [("inputs", &entry.inputs), ("outputs", &entry.outputs)] {
        unique(ports.iter().map(|port| port.name.as_str())).map_err(|name| format!("two {what} are named `{name}`"))?;
        for port in ports {
            check_type(&port.ty).map_err(|why| format!("`{}`: {why}", port.name))?;
        }
    }
    check_frozen(entry)?;
    let mut stages = Vec::new();
    for stage in &entry.stages {
        stages.push(module.graphs.get(stage.index()).ok_or_else(|| format!("stage {stage} does not exist"))?);
    }
    let mut ranks: Vec<u32> = stages.iter().flat_map(|graph| graph.ranks.iter().copied()).collect();
    let count = ranks.len();
    ranks.sort_unstable();
    ranks.dedup();
    if ranks.len() != count {
        return Err("a rank is in two stages".to_owned());
    }
    check_inputs(entry, &stages)?;
    check_outputs(entry, &stages)?;
    check_channels(&stages)
}

fn check_frozen(entry: &Entry) -> Result<(), String> {
    unique(entry.frozen.iter().map(|frozen| frozen.input.as_str()))
        .map_err(|name| format!("`{name}` is frozen twice"))?;
    let ports: HashMap<&str, &Port> = entry.inputs.iter().map(|port| (port.name.as_str(), port)).collect();
    for FrozenInput { input: name, value: tensor, .. } in &entry.frozen {
        let port = ports.get(name.as_str()).ok_or_else(|| format!("frozen `{name}` is no input"))?;
        if port.ty != tensor.ty || tensor.ty.bytes() != Some(tensor.data.len() as u64) {
            let (ty, bytes) = (&tensor.ty, tensor.data.len());
            return Err(format!("frozen `{name}` is {ty} in {bytes} bytes, the input {}", port.ty));
        }
    }
    Ok(())
}

fn check_inputs(entry: &Entry, stages: &[&Graph]) -> Result<(), String> {
    for graph in stages {
        for (index, value) in graph.values.iter().enumerate() {
            let ValueDef::Input(number) = value.def else { continue };
            let place = || format!("graph `{}`, value %{index}", graph.name);
            let port = entry.inputs.get(number as usize);
            let port = port.ok_or_else(|| format!("{}: there is no input {number}", place()))?;
            check_whole(value, &port.ty).map_err(|why| format!("{}, input `{}`: {why}", place(), port.name))?;
        }
    }
    Ok(())
}

fn check_outputs(entry: &Entry, stages: &[&Graph]) -> Result<(), String> {
    let mut produced = vec![0; entry.outputs.len()];
    for graph in stages {
        for output in &graph.outputs {
            let place = format!("graph `{}`, value {}", graph.name, output.value);
            let port = entry.outputs.get(output.position as usize);
            let port = port.ok_or_else(|| format!("{place}: there is no output {}", output.position))?;
            let whole = check_whole(graph.value(output.value), &port.ty);
            whole.map_err(|why| format!("{place}, output `{}`: {why}", port.name))?;
            produced[output.position as usize] += 1;
        }
    }
    match produced.iter().position(|&times| times != 1) {
        Some(index) => Err(format!("output `{}` is produced {} times", entry.outputs[index].name, produced[index])),
        None => Ok(()),
    }
}

/// One side of a channel.
struct End<'g> {
    stage: usize,
    graph: &'g Graph,
    peers: &'g [u32],
    ty: &'g TensorType,
}

impl End<'_> {
    /// That each rank's peer is in `other`'s graph and has this rank as its peer.
    fn faces(&self, other: &Self) -> bool {
        self.graph.ranks.len() == self.peers.len()
            && self.graph.ranks.iter().zip(self.peers).all(|(rank, peer)| {
                let position = other.graph.ranks.binary_search(peer).ok();
                position.and_then(|position| other.peers.get(position)) == Some(rank)
            })
    }
}

fn check_channels(stages: &[&Graph]) -> Result<(), String> {
    let mut channels: BTreeMap<u32, (Vec<End<'_>>, Vec<End<'_>>)> = BTreeMap::new();
    for (stage, graph) in stages.iter().enumerate() {
        for node in &graph.nodes {
            match (&node.op, node.operands.as_slice()) {
                (Op::Send { channel, peers }, [sent]) => {
                    let end = End { stage, graph, peers, ty: graph.ty(*sent) };
                    channels.entry(*channel).or_default().0.push(end);
                }
                (Op::Recv { channel, peers, ty }, _) => {
                    channels.entry(*channel).or_default().1.push(End { stage, graph, peers, ty });
                }
                _ => {}
            }
        }
    }
    for (channel, ends) in channels {
        let (sends, receives) = (&ends.0, &ends.1);
        let ([send], [receive]) = (sends.as_slice(), receives.as_slice()) else {
            return Err(format!("channel {channel} has {} sends and {} receives", sends.len(), receives.len()));
        };
        if send.stage >= receive.stage {
            return Err(format!("channel {channel} does not lead to a later stage"));
        }
        if send.ty != receive.ty {
            return Err(format!("channel {channel} sends {} and receives {}", send.ty, receive.ty));
        }
        if !send.faces(receive) || !receive.faces(send) {
            return Err(format!("channel {channel}: the peers of both sides do not name each other"));
        }
    }
    Ok(())
}
