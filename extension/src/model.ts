// What is drawn, from what the kernel said: no DOM, no kernel, no truth of its own.
import type {
  BreakpointBrief,
  MemoryBrief,
  NodeBrief,
  SessionBrief,
  Snapshot
} from './protocol';
import type { Translation } from './tokens';

/** Keeps the newest snapshot; a kernel that counts anew is a new kernel. */
export class Newest {
  private _snapshot: Snapshot | null = null;

  get snapshot(): Snapshot | null {
    return this._snapshot;
  }

  /** Whether it was newer, and is kept. */
  take(snapshot: Snapshot): boolean {
    const had = this._snapshot;
    if (had && had.kernel === snapshot.kernel && snapshot.rev <= had.rev) {
      return false;
    }
    this._snapshot = snapshot;
    return true;
  }

  clear(): void {
    this._snapshot = null;
  }
}

/** Whether a value that came over a comm has what every snapshot has. */
export function isSnapshot(value: unknown): value is Snapshot {
  if (typeof value !== 'object' || value === null) {
    return false;
  }
  const found = value as Partial<Snapshot>;
  return (
    typeof found.rev === 'number' &&
    typeof found.kernel === 'string' &&
    typeof found.connection === 'string' &&
    Array.isArray(found.sessions) &&
    Array.isArray(found.can)
  );
}

export function currentSession(snapshot: Snapshot | null): SessionBrief | null {
  const found = snapshot?.sessions.find(one => one.id === snapshot.session_id);
  return found ?? null;
}

/** The session that is stopped, if the current one is. */
export function stoppedSession(snapshot: Snapshot | null): SessionBrief | null {
  const session = currentSession(snapshot);
  return session?.status === 'stopped' ? session : null;
}

export function isRunning(snapshot: Snapshot | null): boolean {
  return currentSession(snapshot)?.status === 'running';
}

/** How a layer has a breakpoint: at its output, somewhere inside, for runs to come. */
export type Mark = 'none' | 'on' | 'off' | 'inside';

export interface LadderRow {
  readonly layer: number;
  readonly location: string;
  readonly mark: Mark;
  /** only for runs to come: no session has it yet */
  readonly pending: boolean;
  readonly hits: number;
  readonly condition: string | null;
  /** finished in this forward */
  readonly executed: boolean;
  /** the session stands in it, or at its output */
  readonly here: boolean;
  readonly selected: boolean;
}

/** What a click asked for and the kernel has not yet shown: layer -> breakpoint or none. */
export type Asked = ReadonlyMap<number, boolean>;

const NOTHING_ASKED: Asked = new Map();

/** A row per layer of the model, layer 0 first. */
export function ladder(
  snapshot: Snapshot | null,
  asked: Asked = NOTHING_ASKED
): LadderRow[] {
  if (!snapshot?.model) {
    return [];
  }
  const session = currentSession(snapshot);
  const goesOn =
    session !== null &&
    ['waiting', 'running', 'stopped'].includes(session.status);
  const points = goesOn ? snapshot.breakpoints : [];
  const rows: LadderRow[] = [];
  for (let layer = 0; layer < snapshot.model.num_layers; layer++) {
    const location = `layers.${layer}.output`;
    const at = points.filter(
      one => one.kind === 'breakpoint' && one.location === location
    );
    const inside = points.some(
      one => one.layer === layer && one.location !== location
    );
    const pending = snapshot.pending.find(one => one.location === location);
    const held = at.length > 0 || (!goesOn && pending !== undefined);
    let mark: Mark = inside ? 'inside' : 'none';
    if (held) {
      mark =
        at.length === 0 || at.some(one => one.enabled)
          ? 'on'
          : ('off' as const);
    }
    const wish = asked.get(layer);
    if (wish !== undefined) {
      mark = wish ? 'on' : 'none';
    }
    rows.push({
      layer,
      location,
      mark,
      pending: at.length === 0 && pending !== undefined && wish !== false,
      hits: at.reduce((sum, one) => sum + one.hits, 0),
      condition: at[0]?.condition ?? pending?.condition ?? null,
      executed: session !== null && layer < session.layers_executed,
      here: session?.status === 'stopped' && session.layer === layer,
      selected: snapshot.selection.layer === layer
    });
  }
  return rows;
}

/** Of what was asked, what the kernel still does not show. */
export function stillAsked(snapshot: Snapshot | null, asked: Asked): Asked {
  const rows = ladder(snapshot);
  return new Map(
    [...asked].filter(([layer, wish]) => {
      const mark = rows[layer]?.mark;
      return mark !== undefined && (mark === 'on' || mark === 'off') !== wish;
    })
  );
}

/** What a screen reader says of a layer. */
export function rowName(row: LadderRow, trans: Translation): string {
  const parts = [trans.__('layer %1', row.layer)];
  if (row.mark === 'on') {
    parts.push(
      row.pending
        ? trans.__('breakpoint in runs to come')
        : trans.__('breakpoint')
    );
  } else if (row.mark === 'off') {
    parts.push(trans.__('breakpoint switched off'));
  } else if (row.mark === 'inside') {
    parts.push(trans.__('breakpoint inside the layer'));
  }
  if (row.condition) {
    parts.push(trans.__('if %1', row.condition));
  }
  if (row.here) {
    parts.push(trans.__('stopped here'));
  } else if (row.executed) {
    parts.push(trans.__('has run'));
  }
  return parts.join(', ');
}

/** Where a session stands, in one line. */
export function where(session: SessionBrief, trans: Translation): string {
  switch (session.status) {
    case 'stopped':
      return trans.__(
        'stopped at %1 (%2), forward %3',
        session.location ?? trans.__('its start'),
        session.reason ?? trans.__('no reason'),
        session.forward
      );
    case 'running':
      return session.location
        ? trans.__('running, forward %1', session.forward)
        : trans.__('running');
    case 'waiting':
      return trans.__('waiting to be continued');
    case 'finished':
      return trans.__(
        'finished, %1 tokens',
        session.num_tokens.toLocaleString('en')
      );
    case 'failed':
      return trans.__(
        'failed: %1',
        session.error ?? trans.__('no reason given')
      );
  }
}

/** Bytes with a unit, three digits at most: 12.3 GB. */
export function bytesText(bytes: number): string {
  const units = ['B', 'kB', 'MB', 'GB', 'TB'];
  let value = bytes;
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  const digits = unit === 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
  return `${Number(value.toFixed(digits))} ${units[unit]}`;
}

/** "12 of 40 GB": the unit once, where both have it. */
export function ofText(
  used: number,
  total: number,
  trans: Translation
): string {
  const [usedText, totalText] = [bytesText(used), bytesText(total)];
  const [number, unit] = usedText.split(' ');
  return totalText.endsWith(` ${unit}`)
    ? trans.__('%1 of %2', number, totalText)
    : trans.__('%1 of %2', usedText, totalText);
}

export interface Bar {
  readonly tier: 'device' | 'host' | 'disk';
  readonly label: string;
  readonly text: string;
  /** 0 to 1 */
  readonly share: number;
}

/** A bar per tier there is. */
export function bars(memory: MemoryBrief | null, trans: Translation): Bar[] {
  if (!memory) {
    return [];
  }
  const tiers = [
    ['device', trans.__('device'), memory.device_used, memory.device_total],
    ['host', trans.__('host'), memory.host_used, memory.host_total],
    ['disk', trans.__('disk'), memory.disk_used, memory.disk_total]
  ] as const;
  return tiers
    .filter(([, , , total]) => total > 0)
    .map(([tier, label, used, total]) => ({
      tier,
      label,
      text: ofText(used, total, trans),
      share: Math.min(1, used / total)
    }));
}

/** The line of the status bar. */
export function statusText(
  snapshot: Snapshot | null,
  trans: Translation
): string {
  if (!snapshot) {
    return '';
  }
  const parts: string[] = [];
  const session = currentSession(snapshot);
  switch (snapshot.connection) {
    case 'none':
      parts.push(trans.__('Djinn: no server'));
      break;
    case 'connecting':
      parts.push(trans.__('Djinn: connecting'));
      break;
    case 'loading':
      parts.push(trans.__('Djinn: loading the model'));
      break;
    case 'lost':
      parts.push(trans.__('Djinn: server lost'));
      break;
    case 'denied':
      parts.push(trans.__('Djinn: access token refused'));
      break;
    case 'ready':
      parts.push(
        session === null
          ? trans.__('Djinn: nothing stopped')
          : session.status === 'stopped'
            ? trans.__('stopped at %1', session.location ?? '')
            : where(session, trans)
      );
  }
  const memory = snapshot.memory;
  if (snapshot.connection === 'ready' && memory && memory.device_total > 0) {
    parts.push(
      trans.__('KV %1', ofText(memory.device_used, memory.device_total, trans))
    );
  }
  return parts.join(' · ');
}

/** What the live region says when something arrives; empty: nothing to say. */
export function announcement(
  snapshot: Snapshot | null,
  trans: Translation
): string {
  const session = currentSession(snapshot);
  if (!session || session.status === 'running') {
    return '';
  }
  return where(session, trans);
}

export interface TreeRow {
  readonly node: NodeBrief;
  readonly depth: number;
  readonly isLeaf: boolean;
}

/** The branch tree as rows, each below its parent; a straight line does not go deeper. */
export function tree(branches: readonly NodeBrief[]): TreeRow[] {
  const known = new Set(branches.map(node => node.number));
  const children = new Map<number | null, NodeBrief[]>();
  for (const node of branches) {
    const parent =
      node.parent !== null && known.has(node.parent) ? node.parent : null;
    children.set(parent, [...(children.get(parent) ?? []), node]);
  }
  const rows: TreeRow[] = [];
  const waiting = (children.get(null) ?? [])
    .map(node => ({ node, depth: 0 }))
    .reverse();
  for (let next = waiting.pop(); next; next = waiting.pop()) {
    const { node, depth } = next;
    const below = children.get(node.number) ?? [];
    rows.push({ node, depth, isLeaf: below.length === 0 });
    const deeper = below.length > 1 ? depth + 1 : depth;
    waiting.push(
      ...below.map(child => ({ node: child, depth: deeper })).reverse()
    );
  }
  return rows;
}

/** A breakpoint in one line. */
export function breakpointText(
  point: Pick<BreakpointBrief, 'location' | 'when' | 'condition'> & {
    readonly num_locations?: number;
  },
  trans: Translation
): string {
  const parts = [point.location];
  if (point.num_locations !== undefined && point.num_locations > 1) {
    parts.push(trans.__('and %1 more', point.num_locations - 1));
  }
  if (point.when !== 'any') {
    parts.push(trans.__('in %1', point.when));
  }
  if (point.condition) {
    parts.push(trans.__('if %1', point.condition));
  }
  return parts.join(' ');
}
