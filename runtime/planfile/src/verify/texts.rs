//! Every text of a plan can be shown: none has control characters, which could command the terminal it is shown on.
//! The compiler writes such characters of a model's names as escapes.

use super::Report;
use crate::plan::{Explanations, Implementation, Kernel, Manifest, Plan, PlanEntry, TargetRef};
use crate::printable::printable;

pub(super) fn check(plan: &Plan, report: &mut Report) {
    let mut texts = Vec::new();
    of_manifest(&plan.manifest, &mut texts);
    plan.kernels.iter().for_each(|kernel| of_kernel(kernel, &mut texts));
    texts.extend(plan.code.iter().map(|code| ("architecture", &code.architecture)));
    of_explanations(&plan.explanations, &mut texts);
    for (what, text) in texts {
        report.require(!text.contains(char::is_control), format_args!("{what} `{}`", printable(text)), || {
            "has control characters".to_owned()
        });
    }
}

type Texts<'a> = Vec<(&'static str, &'a String)>;

// Taken apart field by field, so that a new one is not forgotten here.

fn of_manifest<'a>(manifest: &'a Manifest, texts: &mut Texts<'a>) {
    let Manifest { producer, model, files, mesh, target, entries, weights, states, links, .. } = manifest;
    let TargetRef { name, architecture } = target;
    texts.extend([("producer", producer), ("model", model), ("target", name), ("architecture", architecture)]);
    texts.extend(files.iter().map(|file| ("file", &file.name)));
    texts.extend(mesh.iter().map(|axis| ("axis", &axis.name)));
    texts.extend(links.iter().map(|link| ("class of links", &link.class)));
    texts.extend(weights.iter().map(|weight| ("weight", &weight.name)));
    texts.extend(states.iter().map(|state| ("state", &state.name)));
    for PlanEntry { name, inputs, outputs, frozen, programs: _, predicted_ns: _ } in entries {
        texts.push(("entry", name));
        texts.extend(inputs.iter().map(|port| ("input", &port.name)));
        texts.extend(outputs.iter().map(|port| ("output", &port.name)));
        texts.extend(frozen.iter().flat_map(|frozen| [("frozen input", &frozen.input), ("node", &frozen.node)]));
    }
}

fn of_kernel<'a>(kernel: &'a Kernel, texts: &mut Texts<'a>) {
    let Kernel { name, spec: _, implementation } = kernel;
    texts.push(("kernel", name));
    match implementation {
        Implementation::Reference => {}
        Implementation::Cuda { code: _, symbol, rule: _ } => texts.push(("symbol", symbol)),
        Implementation::Library { library: _, version, call: _ } => texts.push(("version", version)),
    }
}

fn of_explanations<'a>(explanations: &'a Explanations, texts: &mut Texts<'a>) {
    let Explanations { names, sharding, alternatives } = explanations;
    texts.extend(names.iter().map(|name| ("node", name)));
    texts.extend(sharding.iter().map(|sentence| ("sentence", sentence)));
    let axes = alternatives.iter().flat_map(|alternative| &alternative.mesh);
    texts.extend(axes.map(|axis| ("axis", &axis.name)));
}
