// Snapshots for the tests, as the kernel makes them: everything said, nothing left out.
import type {
  BreakpointBrief,
  NodeBrief,
  SessionBrief,
  Snapshot
} from '../src/protocol';
import type { Translation, View } from '../src/tokens';

/** English, with values filled in as JupyterLab's bundles do. */
export const english: Translation = {
  __: (text, ...values) => filled(text, values),
  _n: (singular, plural, count, ...values) =>
    filled(count === 1 ? singular : plural, [count, ...values])
};

function filled(text: string, values: (string | number)[]): string {
  return text.replace(/%(\d)/g, (_, place) => String(values[place - 1]));
}

export function session(given: Partial<SessionBrief> = {}): SessionBrief {
  return {
    id: 's1',
    name: '',
    owner: 'me',
    status: 'stopped',
    reason: 'breakpoint',
    location: 'layers.3.output',
    layer: 3,
    forward: 0,
    num_tokens: 14,
    num_prompt_tokens: 14,
    max_new_tokens: 24,
    stop_number: 1,
    layers_executed: 4,
    kv_bytes: 1_000_000,
    tier: 'device',
    pinned: false,
    parent: null,
    error: null,
    taken_over: false,
    ...given
  };
}

export function breakpoint(
  given: Partial<BreakpointBrief> = {}
): BreakpointBrief {
  return {
    id: 1,
    location: 'layers.3.output',
    num_locations: 1,
    layer: 3,
    kind: 'breakpoint',
    when: 'any',
    condition: null,
    enabled: true,
    hits: 1,
    stops: 1,
    ...given
  };
}

export function node(given: Partial<NodeBrief>): NodeBrief {
  return {
    number: 0,
    parent: null,
    location: 'layers.3.output',
    forward: 0,
    reason: 'step',
    status: 'stopped',
    current: false,
    kept: true,
    num_tokens: 14,
    num_edits: 0,
    ...given
  };
}

export function snapshot(given: Partial<Snapshot> = {}): Snapshot {
  return {
    rev: 1,
    kernel: 'k1',
    connection: 'ready',
    address: '127.0.0.1:5556',
    notice: null,
    progress: null,
    model: {
      name: 'tiny',
      num_layers: 6,
      hidden_size: 32,
      num_heads: 4,
      dtype: 'float32',
      device: 'cpu',
      sites: ['attention.output', 'output'],
      has_tokenizer: true,
      random_weights: false
    },
    session_id: 's1',
    sessions: [session()],
    breakpoints: [breakpoint()],
    pending: [],
    branches: [],
    edits: [],
    memory: null,
    selection: { session_id: 's1', layer: 3, head: null, token: 13 },
    actions: [],
    busy: null,
    can: ['continue', 'next', 'toggle_breakpoint'],
    ...given
  };
}

export function view(given: Partial<View> = {}): View {
  return {
    link: 'attached',
    notebook: 'tour.ipynb',
    snapshot: snapshot(),
    urgent: true,
    waiting: false,
    ...given
  };
}
