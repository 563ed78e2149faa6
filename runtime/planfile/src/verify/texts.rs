//! Every text of a plan can be shown: none has control characters, which could command the terminal it is shown on.
//! The compiler writes such characters of a model's names as escapes.

use super::Report;
use crate::plan::{Explanations, Implementation, Kernel, Manifest, Plan, PlanPort};
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

fn of_manifest<'a>(manifest: &'a Manifest, texts: &mut Texts<'a>) {
    let target = &manifest.target;
    texts.extend([("producer", &manifest.producer), ("model", &manifest.model)]);
    texts.extend([("target", &target.name), ("architecture", &target.architecture)]);
    texts.extend(manifest.files.iter().map(|file| ("file", &file.name)));
    texts.extend(manifest.mesh.iter().map(|axis| ("axis", &axis.name)));
    texts.extend(manifest.links.iter().map(|link| ("class of links", &link.class)));
    texts.extend(manifest.weights.iter().map(|weight| ("weight", &weight.name)));
    texts.extend(manifest.states.iter().map(|state| ("state", &state.name)));
    for entry in &manifest.entries {
        let names = |what, ports: &'a [PlanPort]| ports.iter().map(move |port| (what, &port.name));
        texts.push(("entry", &entry.name));
        texts.extend(names("input", &entry.inputs).chain(names("output", &entry.outputs)));
        texts.extend(entry.pinned.iter().map(|(name, _)| ("pinned input", name)));
    }
}

fn of_kernel<'a>(kernel: &'a Kernel, texts: &mut Texts<'a>) {
    texts.push(("kernel", &kernel.name));
    match &kernel.implementation {
        Implementation::Reference => {}
        Implementation::Cuda { code: _, symbol } => texts.push(("symbol", symbol)),
        Implementation::Library { library: _, version, call: _ } => texts.push(("version", version)),
    }
}

fn of_explanations<'a>(explanations: &'a Explanations, texts: &mut Texts<'a>) {
    texts.extend(explanations.names.iter().map(|name| ("node", name)));
    texts.extend(explanations.sharding.iter().map(|sentence| ("sentence", sentence)));
    let axes = explanations.alternatives.iter().flat_map(|alternative| &alternative.mesh);
    texts.extend(axes.map(|axis| ("axis", &axis.name)));
}
