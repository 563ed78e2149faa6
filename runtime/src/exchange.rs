//! Where ranks meet: what collectives and messages between virtual devices are made of.
//!
//! Nobody waits for a rank that failed: a failure wakes everyone who waits, and everyone who comes later.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use planfile::Buffer;

use crate::error::StepError;

/// A step of a program that a group of ranks does together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Meeting {
    pub(crate) program: usize,
    pub(crate) step: usize,
    pub(crate) group: usize,
}

/// A way from rank to rank; messages on it arrive in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Route {
    pub(crate) channel: u32,
    pub(crate) from: u32,
    pub(crate) to: u32,
}

/// The ranks' common ground during one run of an entry.
#[derive(Default)]
pub(crate) struct Exchange {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    meetings: BTreeMap<Meeting, Gathering>,
    mail: BTreeMap<Route, VecDeque<Buffer>>,
    failed: bool,
}

/// A meeting that has begun.
struct Gathering {
    /// By position in the group.
    parts: Vec<Option<Buffer>>,
    missing: usize,
    outcome: Option<Arc<Vec<Buffer>>>,
    /// Members that have not taken the outcome yet.
    remaining: usize,
}

impl Exchange {
    /// A panic elsewhere leaves the state whole, and its rank is reported as failed.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings `part` as the `member`-th of `members` ranks and waits for the others.
    ///
    /// The last to come turns all parts, in the order of the group, into the outcome that everyone gets.
    pub(crate) fn meet(
        &self,
        meeting: Meeting,
        (member, members): (usize, usize),
        part: Buffer,
        complete: impl FnOnce(Vec<Buffer>) -> Result<Vec<Buffer>, StepError>,
    ) -> Result<Arc<Vec<Buffer>>, StepError> {
        let mut state = self.lock();
        let gathering = state.meetings.entry(meeting).or_insert_with(|| Gathering {
            parts: (0..members).map(|_| None).collect(),
            missing: members,
            outcome: None,
            remaining: members,
        });
        match gathering.parts.get_mut(member) {
            Some(place @ None) if gathering.outcome.is_none() => *place = Some(part),
            _ => return Err(StepError::Contradiction { what: "a rank meets its group twice in a step".to_owned() }),
        }
        gathering.missing -= 1;
        if gathering.missing == 0 {
            let parts = gathering.parts.iter_mut().filter_map(Option::take).collect();
            drop(state);
            let outcome = Arc::new(complete(parts)?);
            state = self.lock();
            if let Some(gathering) = state.meetings.get_mut(&meeting) {
                gathering.outcome = Some(outcome);
            }
            self.changed.notify_all();
        }
        loop {
            if state.failed {
                return Err(StepError::Abandoned);
            }
            if let Some(gathering) = state.meetings.get_mut(&meeting)
                && let Some(outcome) = gathering.outcome.clone()
            {
                gathering.remaining -= 1;
                if gathering.remaining == 0 {
                    state.meetings.remove(&meeting);
                }
                return Ok(outcome);
            }
            state = self.wait(state);
        }
    }

    /// Leaves a message; does not wait.
    pub(crate) fn send(&self, route: Route, message: Buffer) {
        self.lock().mail.entry(route).or_default().push_back(message);
        self.changed.notify_all();
    }

    /// Waits for the next message on a route.
    pub(crate) fn receive(&self, route: Route) -> Result<Buffer, StepError> {
        let mut state = self.lock();
        loop {
            if let Some(message) = state.mail.get_mut(&route).and_then(VecDeque::pop_front) {
                return Ok(message);
            }
            if state.failed {
                return Err(StepError::Abandoned);
            }
            state = self.wait(state);
        }
    }

    /// A witness of a rank's work: unless told that all went well, it tells everyone when it goes.
    pub(crate) fn watch(&self) -> Watch<'_> {
        Watch { exchange: self, finished: false }
    }
}

/// See [`Exchange::watch`]. Covers errors and panics alike.
pub(crate) struct Watch<'a> {
    exchange: &'a Exchange,
    finished: bool,
}

impl Watch<'_> {
    pub(crate) fn finished(mut self) {
        self.finished = true;
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if !self.finished {
            self.exchange.lock().failed = true;
            self.exchange.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const MEETING: Meeting = Meeting { program: 0, step: 3, group: 1 };
    const ROUTE: Route = Route { channel: 0, from: 0, to: 1 };

    #[test]
    fn parts_are_in_the_order_of_the_group() {
        let exchange = Exchange::default();
        thread::scope(|scope| {
            let members: Vec<_> = (0..4u8)
                .rev()
                .map(|member| {
                    let exchange = &exchange;
                    scope.spawn(move || {
                        let part = Buffer::from_bytes(&[member]);
                        exchange.meet(MEETING, (usize::from(member), 4), part, Ok).unwrap()
                    })
                })
                .collect();
            for member in members {
                let outcome = member.join().unwrap();
                let bytes: Vec<u8> = outcome.iter().map(|part| part.bytes()[0]).collect();
                assert_eq!(bytes, [0, 1, 2, 3]);
            }
        });
        assert!(exchange.lock().meetings.is_empty());
    }

    #[test]
    fn messages_arrive_in_order() {
        let exchange = Exchange::default();
        thread::scope(|scope| {
            let receiver = scope.spawn(|| [exchange.receive(ROUTE).unwrap(), exchange.receive(ROUTE).unwrap()]);
            exchange.send(ROUTE, Buffer::from_bytes(&[1]));
            exchange.send(ROUTE, Buffer::from_bytes(&[2]));
            assert_eq!(receiver.join().unwrap().map(|message| message.bytes()[0]), [1, 2]);
        });
    }

    #[test]
    fn nobody_waits_for_a_rank_that_failed() {
        let exchange = Exchange::default();
        thread::scope(|scope| {
            let meets = scope.spawn(|| exchange.meet(MEETING, (0, 2), Buffer::default(), Ok).map(drop));
            let receives = scope.spawn(|| exchange.receive(ROUTE).map(drop));
            drop(exchange.watch());
            assert_eq!(meets.join().unwrap(), Err(StepError::Abandoned));
            assert_eq!(receives.join().unwrap(), Err(StepError::Abandoned));
        });
    }

    #[test]
    fn a_panic_is_a_failure() {
        let exchange = Exchange::default();
        thread::scope(|scope| {
            let panics = scope.spawn(|| {
                let _watch = exchange.watch();
                panic!("on purpose");
            });
            assert!(panics.join().is_err());
        });
        assert_eq!(exchange.receive(ROUTE).map(drop), Err(StepError::Abandoned));
        let fine = Exchange::default();
        fine.watch().finished();
        assert!(!fine.lock().failed);
    }

    #[test]
    fn a_failed_combination_reaches_everyone() {
        let exchange = Exchange::default();
        let error = || StepError::Contradiction { what: "on purpose".to_owned() };
        thread::scope(|scope| {
            let members: Vec<_> = (0..2)
                .map(|member| {
                    let exchange = &exchange;
                    scope.spawn(move || {
                        let watch = exchange.watch();
                        exchange.meet(MEETING, (member, 2), Buffer::default(), |_| Err(error()))?;
                        watch.finished();
                        Ok(())
                    })
                })
                .collect();
            let mut outcomes: Vec<Result<(), StepError>> =
                members.into_iter().map(|member| member.join().unwrap()).collect();
            outcomes.sort_by_key(|outcome| outcome == &Err(StepError::Abandoned));
            assert_eq!(outcomes, [Err(error()), Err(StepError::Abandoned)]);
        });
    }
}
