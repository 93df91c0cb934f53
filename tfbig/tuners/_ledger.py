"""Who does what in a search: three tables beside the study's, changed by transactions.

A trial of the search is a slot. A slot is taken, then held by beats, by one process at a
time; what another process does in its name is refused. A process that does not beat any
more is found out by its own count of beats, which stands still, so clocks need not agree.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import time
import uuid

import sqlalchemy as sa

__all__ = ("Ledger", "Slot")

# Seconds between the beats of a process, at most.
_LONGEST_BEAT = 10.0

_METADATA = sa.MetaData()

_SLOTS = sa.Table(
    "tfbig_slots",
    _METADATA,
    sa.Column("study", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("slot", sa.Integer, primary_key=True, autoincrement=False),
    # Empty: free to be taken.
    sa.Column("owner", sa.String(200), nullable=False),
    sa.Column("beat", sa.Integer, nullable=False),
    # How often it was taken from a process that had died.
    sa.Column("died", sa.Integer, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    # JSON: what is known of it beside the study.
    sa.Column("note", sa.Text, nullable=False),
)

_CLAIMS = sa.Table(
    "tfbig_claims",
    _METADATA,
    sa.Column("study", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.String(80), primary_key=True),
    sa.Column("slot", sa.Integer, nullable=False),
)

_FACTS = sa.Table(
    "tfbig_facts",
    _METADATA,
    sa.Column("study", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.String(80), primary_key=True),
    sa.Column("text", sa.Text, nullable=False),
)

# A slot is one of these: held by a process or free to be; to be continued when that is decided;
# with its result in the note; told to the study.
RUNNING, PAUSED, ENDED, TOLD = "running", "paused", "ended", "told"


@dataclasses.dataclass(frozen=True)
class Slot:
    """A row: see the table."""

    slot: int
    owner: str
    beat: int
    died: int
    state: str
    note: str


def this_process():
    """A name of this process that no other ever has."""
    pid = os.getpid()
    return f"{_machine()}|{pid}|{_started(pid)}|{uuid.uuid4().hex[:8]}"


def _machine():
    with contextlib.suppress(OSError):
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()[:60]}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()[:60]


def _started(pid):
    """When a process was started, in ticks; "" where that cannot be known."""
    with contextlib.suppress(OSError, IndexError):
        status = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # A zombie does nothing more.
        return "" if status[0] == "Z" else status[19]
    return ""


def is_dead(owner):
    """Whether a process certainly lives no more; of another machine that is not known."""
    machine, pid, started, _ = owner.split("|")
    return bool(started) and machine == _machine() and _started(int(pid)) != started


def process_id(owner):
    """The id of a process of this machine; None of another."""
    machine, _, rest = owner.partition("|")
    return int(rest.split("|")[0]) if rest and machine == _machine() else None


class Ledger:
    """The tables, for one study and one process.

    Args:
        engine: `sqlalchemy.Engine`, whose transactions do not see each other's middle.
        study: int, the id of the study.
        grace: float, seconds after which a slot whose beats stand still may be taken.
    """

    def __init__(self, engine, study, grace):
        self._engine = engine
        self._study = study
        self._grace = grace
        self.owner = this_process()
        # Seconds between two beats.
        self.interval = min(grace / 6, _LONGEST_BEAT)
        # By slot: the last beat that was seen, and when.
        self._seen: dict[int, tuple[tuple[str, int], float]] = {}

    def _where(self, table, **columns):
        found = [table.c.study == self._study]
        found += [getattr(table.c, name) == value for name, value in columns.items()]
        return sa.and_(*found)

    # --- Slots ---

    def slots(self, **where):
        """All slots, or those with some values, in their order."""
        columns = [getattr(_SLOTS.c, f.name) for f in dataclasses.fields(Slot)]
        query = sa.select(*columns).where(self._where(_SLOTS, **where)).order_by(_SLOTS.c.slot)
        with self._engine.begin() as connection:
            return [Slot(*row) for row in connection.execute(query)]

    def take_new(self, most, claim=None):
        """Makes the next slot, takes it, and claims a name for it.

        Returns:
            Its number; None if there are `most`, or if another has the name.
        """
        count = sa.select(sa.func.count()).where(self._where(_SLOTS))
        new = {"study": self._study, "owner": self.owner, "beat": 0, "died": 0}
        while True:
            try:
                with self._engine.begin() as connection:
                    slot = connection.execute(count).scalar_one()
                    if most is not None and slot >= most:
                        return None
                    connection.execute(
                        _SLOTS.insert().values(slot=slot, state=RUNNING, note="{}", **new)
                    )
                    if claim is not None:
                        values = {"study": self._study, "name": claim, "slot": slot}
                        connection.execute(_CLAIMS.insert().values(**values))
                return slot
            except sa.exc.IntegrityError:  # Another was faster.
                if claim in self.claims():
                    return None

    def take(self, slot, note=None, died=0):
        """Takes a slot as it was seen; returns whether it was still so."""
        return self._update(
            {"slot": slot.slot, "owner": slot.owner, "beat": slot.beat, "state": slot.state},
            owner=self.owner,
            beat=0,
            died=slot.died + died,
            state=RUNNING,
            note=slot.note if note is None else note,
        )

    def _update(self, where, **values):
        with self._engine.begin() as connection:
            done = connection.execute(
                _SLOTS.update().where(self._where(_SLOTS, **where)).values(**values)
            )
            return done.rowcount == 1

    def _of_mine(self, slot):
        return {"slot": slot, "owner": self.owner, "state": RUNNING}

    def beat(self, slot):
        """Says that this process lives; returns whether the slot is still its own."""
        return self._update(self._of_mine(slot), beat=_SLOTS.c.beat + 1)

    def put(self, slot, state, **note):
        """Moves a slot of this process on, and adds to its note; whether it was still its own."""
        where = self._where(_SLOTS, **self._of_mine(slot))
        with self._engine.begin() as connection:
            query = sa.select(_SLOTS.c.note).where(where).with_for_update()
            known = connection.execute(query).scalar_one_or_none()
            if known is None:
                return False
            new = json.dumps(json.loads(known) | note)
            connection.execute(_SLOTS.update().where(where).values(state=state, note=new))
        return True

    def release(self, slot, **note):
        """Lets another process, or this one, take a slot of this process."""
        return self.put(slot, RUNNING, **note) and self._update(self._of_mine(slot), owner="")

    def move(self, slot, state):
        """Moves a slot that nobody holds from the state it was seen in to another."""
        return self._update(
            {"slot": slot.slot, "state": slot.state, "owner": slot.owner}, state=state, owner=""
        )

    def abandoned(self):
        """Running slots whose process has ended, or has not been heard of for long."""
        found, now = [], time.monotonic()
        for slot in self.slots(state=RUNNING):
            if slot.owner == self.owner:
                continue
            state = (slot.owner, slot.beat)
            seen, since = self._seen.get(slot.slot, (None, now))
            if seen != state:
                self._seen[slot.slot] = (state, since := now)
            if not slot.owner or is_dead(slot.owner) or now - since >= self._grace:
                found.append(slot)
        return found

    # --- Processes ---

    @property
    def _name(self):
        return f"process {self.owner[-8:]}"

    def enter(self):
        """Lets others know that this process works on the study."""
        self.fact(self._name, self.owner)

    def leave(self):
        """Lets others know that it does not any more."""
        with self._engine.begin() as connection:
            connection.execute(_FACTS.delete().where(self._where(_FACTS, name=self._name)))

    def others(self):
        """Whether other processes work on the study; takes time where they may be elsewhere."""
        names = _FACTS.c.name.like("process %")
        with self._engine.begin() as connection:
            query = sa.select(_FACTS.c.text).where(self._where(_FACTS), names)
            entered = connection.execute(query).scalars().all()
        here = [o for o in entered if process_id(o) not in (None, os.getpid())]
        if any(not is_dead(owner) for owner in here):
            return True
        before = {
            s.slot: s
            for s in self.slots(state=RUNNING)
            if s.owner and process_id(s.owner) != os.getpid()
        }
        if not any(not is_dead(s.owner) for s in before.values()):
            return False
        deadline = time.monotonic() + min(self._grace, _LONGEST_BEAT * 1.5)
        while time.monotonic() < deadline:
            time.sleep(0.2)
            now = {s.slot: s for s in self.slots()}
            if any(now.get(slot) != row for slot, row in before.items()):
                return True
        return False

    # --- Claims ---

    def claim(self, slot, name):
        """Claims a name for a slot; returns whether it has it now."""
        owner = sa.select(_CLAIMS.c.slot).where(self._where(_CLAIMS, name=name))
        try:
            with self._engine.begin() as connection:
                holder = connection.execute(owner).scalar_one_or_none()
                if holder is None:
                    values = {"study": self._study, "name": name, "slot": slot}
                    connection.execute(_CLAIMS.insert().values(**values))
                return holder is None or holder == slot
        except sa.exc.IntegrityError:
            return False  # Another was faster.

    def claims(self, **where):
        """All names that are claimed, or those of one slot."""
        with self._engine.begin() as connection:
            query = sa.select(_CLAIMS.c.name).where(self._where(_CLAIMS, **where))
            return set(connection.execute(query).scalars())

    # --- Facts ---

    def fact(self, name, text=None):
        """What is known under a name; `text` becomes known if nothing is."""
        query = sa.select(_FACTS.c.text).where(self._where(_FACTS, name=name))
        try:
            with self._engine.begin() as connection:
                known = connection.execute(query).scalar_one_or_none()
                if known is None and text is not None:
                    values = {"study": self._study, "name": name, "text": text}
                    connection.execute(_FACTS.insert().values(**values))
                    return text
                return known
        except sa.exc.IntegrityError:
            return self.fact(name)

    def change_fact(self, name, change):
        """Replaces what is known under a name by what a function makes of it."""
        try:
            return self._changed_fact(name, change)
        except sa.exc.IntegrityError:  # Another was faster; there is a row to lock now.
            return self._changed_fact(name, change)

    def _changed_fact(self, name, change):
        query = sa.select(_FACTS.c.text).where(self._where(_FACTS, name=name)).with_for_update()
        with self._engine.begin() as connection:
            known = connection.execute(query).scalar_one_or_none()
            new = change(known)
            if known is None:
                values = {"study": self._study, "name": name, "text": new}
                connection.execute(_FACTS.insert().values(**values))
            elif new != known:
                connection.execute(
                    _FACTS.update().where(self._where(_FACTS, name=name)).values(text=new)
                )
        return new

    def clear(self):
        """Removes all that is known of the study."""
        with self._engine.begin() as connection:
            for table in (_SLOTS, _CLAIMS, _FACTS):
                connection.execute(table.delete().where(self._where(table)))


def create_tables(engine):
    _METADATA.create_all(engine)
