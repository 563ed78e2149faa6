//! Tests of rewriting.

use planfile::{DType, Dim, TensorType};

use super::*;
use crate::module::origin;
use crate::text::{graph_text, parse_lines};
use crate::verify::verify;

type Made = Result<Vec<ValueId>, IrError>;

#[track_caller]
fn rewritten(before: &str, node: impl FnMut(&mut Edit<'_>, &Node) -> Made) -> Module {
    let module = parse_lines(before).unwrap().rewrite(node).unwrap();
    verify(&module).unwrap_or_else(|error| panic!("{error}\n{module}"));
    module
}

#[track_caller]
fn check(before: &str, after: &str, node: impl FnMut(&mut Edit<'_>, &Node) -> Made) {
    let (module, expected) = (rewritten(before, node), parse_lines(after).unwrap().compacted());
    assert_eq!(graph_text(&module, &module.graphs[0]), graph_text(&expected, &expected.graphs[0]));
    assert_eq!(module.weights.len(), expected.weights.len());
}

fn refused(before: &str, node: impl FnMut(&mut Edit<'_>, &Node) -> Made) -> String {
    parse_lines(before).unwrap().rewrite(node).unwrap_err().to_string()
}

/// A chain with a node of two results, something nobody reads, and a weight that goes with it.
const SOME: &str = "%x: f32[4]
    %w: f32[4] = weight [1, 2, 3, 4]
    %unread = pointwise %x, %w {$0 * $1}                        # unread
    %h = pointwise %x {exp($0)}                                 # h
    %top: f32[2], %at: i64[2] = top_k %h {axis 0, k 2} # top
    %y = pointwise %top {$0 + 1.0}                              # y
    return %y, %at";

#[test]
fn what_is_kept_is_what_it_was_without_what_nobody_reads() {
    let after = SOME.lines().filter(|line| !line.contains("unread") && !line.contains("%w")).collect::<Vec<_>>();
    check(SOME, &after.join("\n"), |edit, node| edit.keep(node));
}

#[test]
fn nodes_are_replaced_inserted_and_dropped() {
    check(
        SOME,
        "%x: f32[4]
         %n = pointwise %x {-$0}                                     # h
         %top: f32[2], %at: i64[2] = top_k %n {axis 0, k 2} # top
         return %top, %at",
        |edit, node| match node.origin.first().map(|name| &**name) {
            // Nobody reads it.
            Some("unread") => Ok(vec![]),
            Some("h") => {
                let x = edit.value(node.operands[0])?;
                let expr = planfile::Expr::operand(0).unary(planfile::Unary::Neg);
                edit.add(Op::Pointwise { expr, dims: edit.new_graph().ty(x).dims.clone() }, &[x], &node.origin)
            }
            // Its operand is there already.
            Some("y") => edit.operands(node),
            _ => edit.keep(node),
        },
    );
}

#[test]
fn an_operand_may_become_another_for_one_reader() {
    check(
        "%x: f32[2, 3]
         %y: f32[6] = reshape %x  # y
         %z: f32[3, 2] = reshape %x
         return %y, %z",
        "%x: f32[2, 3]
         %t = transpose %x [1, 0] # y
         %y: f32[6] = reshape %t  # y
         %z: f32[3, 2] = reshape %x
         return %y, %z",
        |edit, node| {
            let x = edit.value(node.operands[0])?;
            if *node.origin == *origin("y") {
                let moved = edit.add_one(Op::Transpose { permutation: vec![1, 0] }, &[x], &node.origin)?;
                edit.set(node.operands[0], moved);
            }
            let kept = edit.keep(node)?;
            edit.set(node.operands[0], x);
            Ok(kept)
        },
    );
}

#[test]
fn shards_stay_with_what_stands_for_them() {
    let text = "mesh tensor=2
        %x: f32[2] of [4] split(0: tensor)
        %h: f32[2] of [4] split(0: tensor) = pointwise %x {exp($0)}
        %y: f32[2] of [4] split(0: tensor) = pointwise %h {-$0}
        return %y";
    check(text, text, |edit, node| {
        let operands = edit.operands(node)?;
        edit.add(node.op.clone(), &operands, &node.origin)
    });
    // One that was there before keeps its own: a whole tensor is no shard because another one was.
    let module = rewritten(
        "mesh tensor=2
         %x: f32[2]
         %y = pointwise %x {exp($0)}
         %h: f32[2] of [4] split(0: tensor) = pointwise %y {-$0} # h
         %z: f32[2] of [4] split(0: tensor) = pointwise %h {-$0}
         return %y, %z",
        |edit, node| if *node.origin == *origin("h") { edit.operands(node) } else { edit.keep(node) },
    );
    assert_eq!(module.graphs[0].values.iter().filter(|value| value.shard.is_some()).count(), 1);
}

#[test]
fn what_is_emptied_must_not_be_read() {
    let chain = "%x: f32[3]
         %a = pointwise %x {exp($0)} # a
         %y = pointwise %a {-$0}     # y
         return %y";
    let emptying = |operand: fn(&mut Edit<'_>, &Node) -> ValueId| {
        let module = parse_lines(chain).unwrap().rewrite(|edit, node| {
            let read = operand(edit, node);
            let made = edit.add(node.op.clone(), &[read], &node.origin)?;
            let own = edit.value(node.operands[0])?;
            edit.empty(own);
            Ok::<_, IrError>(made)
        });
        module.unwrap()
    };
    // Reads what is before its operand.
    let skipping = emptying(|edit, node| {
        let own = edit.value(node.operands[0]).unwrap();
        edit.new_graph().producer(own).map_or(own, |producer| producer.operands[0])
    });
    assert_eq!((verify(&skipping), skipping.graphs[0].nodes.len()), (Ok(()), 1), "{skipping}");
    let reading = emptying(|edit, node| edit.value(node.operands[0]).unwrap());
    assert!(verify(&reading).is_err(), "{reading}");
}

#[test]
fn reads_are_those_of_the_graph_as_it_was() {
    let mut reads = Vec::new();
    let module = rewritten(
        "%x: f32[3]
         %a = pointwise %x {exp($0)}
         %b = pointwise %a, %a {$0 * $1}
         return %b, %b",
        |edit, node| {
            let old = edit.old();
            reads.push((
                old.reads(node.operands[0]),
                old.reads(node.results[0]),
                old.private(node.results[0]).is_some(),
            ));
            edit.keep(node)
        },
    );
    assert_eq!(reads, [(1, 2, false), (2, 2, false)], "{module}");
}

#[test]
fn an_equal_node_hands_its_names_on() {
    check(
        "%x: f32[3]
         %a = pointwise %x {exp($0)}     # a
         %b = pointwise %x {exp($0)}     # b
         %y = pointwise %a, %b {$0 - $1} # y
         return %y",
        "%x: f32[3]
         %a = pointwise %x {exp($0)}     # a + b
         %y = pointwise %a, %a {$0 - $1} # y
         return %y",
        |edit, node| match node.origin.first().map(|name| &**name) {
            Some("b") => {
                let known = edit.new_graph().nodes[0].results.clone();
                edit.also_from(known[0], &node.origin);
                Ok(known)
            }
            _ => edit.keep(node),
        },
    );
}

#[test]
fn what_stands_for_a_result_has_its_number_and_its_size() {
    let one = |edit: &mut Edit<'_>, node: &Node| edit.keep(node).map(|kept| kept[..1].to_vec());
    assert!(refused(SOME, one).contains("1 values stand for 2 results of top_k"));
    let first = |edit: &mut Edit<'_>, node: &Node| Ok(vec![edit.value(node.operands[0])?]);
    let sum = "%x: f32[2, 3]\n%y: f32[2] = reduce %x {sum [1]}\nreturn %y";
    assert!(refused(sum, first).contains("f32[2, 3] stands for f32[2], a result of reduce"));
    assert!(refused(sum, |_, _| Ok(vec![ValueId(9)])).contains("%9 is no value of the new graph"));
}

#[test]
fn what_was_dropped_is_not_read() {
    let why = refused(SOME, |edit, node| if node.results.len() == 2 { Ok(vec![]) } else { edit.keep(node) });
    assert!(why.contains("nothing stands for it"), "{why}");
}

#[test]
fn types_follow_and_are_refused_where_they_do_not() {
    let twice = |edit: &mut Edit<'_>, node: &Node| {
        let x = edit.value(node.operands[0])?;
        edit.add(Op::Reshape { dims: vec![Dim::Static(5)] }, &[x], &node.origin)
    };
    let why = refused("%x: f32[4]\n%y = pointwise %x {exp($0)} # from\nreturn %y", twice);
    assert!(why.contains("reshape (from `from`)"), "{why}");
}

#[test]
fn outputs_may_be_what_a_rewriting_says() {
    struct Converted;

    impl Rewrite for Converted {
        type Error = IrError;

        fn node(&mut self, edit: &mut Edit<'_>, node: &Node) -> Made {
            edit.keep(node)
        }

        fn output(&mut self, edit: &mut Edit<'_>, output: Output) -> Result<ValueId, IrError> {
            let value = edit.value(output.value)?;
            let dims = edit.new_graph().ty(value).dims.clone();
            let expr = planfile::Expr::operand(0).cast(DType::F16);
            edit.add_one(Op::Pointwise { expr, dims }, &[value], &origin("out"))
        }
    }

    let module = parse_lines("%x: f32[3]\n%y = pointwise %x {exp($0)}\nreturn %y").unwrap();
    let graph = module.graphs[0].rewrite_with(&mut Converted).unwrap();
    assert_eq!(graph.ty(graph.outputs[0].value), &TensorType::new(DType::F16, &[3]));
}

/// Anything that looked at all nodes for each node would take hours.
#[test]
fn a_hundred_thousand_nodes_are_no_matter() {
    const NODES: u32 = 100_000;
    let ty = TensorType::new(DType::F32, &[1]);
    let mut graph = Graph::new("long");
    let mut value = graph.add_source(ty.clone(), ValueDef::Input(0));
    let from = origin("a");
    for input in 1..=NODES {
        let other = graph.add_source(ty.clone(), ValueDef::Input(input));
        let expr = planfile::Expr::operand(0).binary(planfile::Binary::Add, planfile::Expr::operand(1));
        value = graph.add_one(Op::Pointwise { expr, dims: ty.dims.clone() }, &[value, other], &from).unwrap();
    }
    graph.outputs.push(Output { position: 0, value });
    let kept = graph.rewrite(|edit, node| edit.keep(node)).unwrap();
    assert_eq!(kept.nodes.len(), NODES as usize);
    // Every second one is its own first operand.
    let mut second = false;
    let halved = graph
        .rewrite(|edit, node| {
            second = !second;
            if second { Ok(vec![edit.value(node.operands[0])?]) } else { edit.keep(node) }
        })
        .unwrap();
    assert_eq!((halved.nodes.len(), halved.values.len()), (NODES as usize / 2, NODES as usize + 1));
}

/// Comparing each operand with those before it would be twenty thousand million comparisons.
#[test]
fn nor_are_two_hundred_thousand_operands() {
    const OPERANDS: u32 = 200_000;
    let mut graph = Graph::new("wide");
    let ty = TensorType::new(DType::F32, &[1]);
    let operands: Vec<ValueId> = (0..OPERANDS).map(|i| graph.add_source(ty.clone(), ValueDef::Input(i))).collect();
    let value = graph.add_one(Op::Concat { axis: 0 }, &operands, &origin("a")).unwrap();
    graph.outputs.push(Output { position: 0, value });
    assert_eq!(graph.rewrite(|edit, node| edit.keep(node)).unwrap(), graph);
}
