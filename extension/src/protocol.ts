// Generated from kernel_server.protocol; do not edit. To make it anew:
//   python -m kernel_server.protocol.typescript

export type Status =
  | 'waiting'
  | 'running'
  | 'stopped'
  | 'finished'
  | 'failed';

export type Reason =
  | 'entry'
  | 'breakpoint'
  | 'data breakpoint'
  | 'step'
  | 'pause'
  | 'exception';

export type When =
  | 'any'
  | 'prefill'
  | 'decode';

export type BreakpointKind =
  | 'breakpoint'
  | 'data breakpoint'
  | 'logpoint';

export type Connection =
  | 'none'
  | 'connecting'
  | 'loading'
  | 'ready'
  | 'lost'
  | 'denied';

export type Level =
  | 'error'
  | 'warning'
  | 'info';

export type Outcome =
  | 'running'
  | 'done'
  | 'failed';

export type Tier =
  | 'none'
  | 'device'
  | 'host'
  | 'disk'
  | 'mixed';

export const LAYER_SITES: readonly string[] = [
  'input',
  'attention.q',
  'attention.k',
  'attention.v',
  'attention.pattern',
  'attention.heads',
  'attention.output',
  'middle',
  'mlp.neurons',
  'mlp.output',
  'output'
];

export const OUTER_SITES: readonly string[] = [
  'embedding',
  'final_norm',
  'logits'
];

/** Something a person should know: what happened, and what to do about it. */
export interface Notice {
  readonly level: Level;
  /** the error's code, or a word for a state such as `TakenOver` */
  readonly code: string;
  readonly text: string;
  readonly advice: string;
}

/** How far something is, 0 to 1; None when nobody knows. */
export interface ProgressBrief {
  readonly text: string;
  readonly done: number | null;
}

/** The model served. */
export interface ModelBrief {
  readonly name: string;
  readonly num_layers: number;
  readonly hidden_size: number;
  /** of the layers, where all agree */
  readonly num_heads: number | null;
  readonly dtype: string;
  readonly device: string;
  /** inside and at the end of a layer, in the order of a forward */
  readonly sites: readonly string[];
  readonly has_tokenizer: boolean;
  readonly random_weights: boolean;
}

/** A session, as a list or a ladder shows it. */
export interface SessionBrief {
  readonly id: string;
  readonly name: string;
  readonly owner: string;
  readonly status: Status;
  readonly reason: Reason | null;
  readonly location: string | null;
  /** the layer it stands in or after; None before the first and after the last */
  readonly layer: number | null;
  readonly forward: number;
  readonly num_tokens: number;
  readonly num_prompt_tokens: number;
  readonly max_new_tokens: number;
  readonly stop_number: number;
  /** distinct layers finished in this forward */
  readonly layers_executed: number;
  readonly kv_bytes: number;
  readonly tier: Tier;
  readonly pinned: boolean;
  readonly parent: string | null;
  readonly error: string | null;
  /** another client moved it since this notebook last looked */
  readonly taken_over: boolean;
}

/** A breakpoint of the current session. */
export interface BreakpointBrief {
  readonly id: number;
  readonly location: string;
  /** how many locations it has; a data breakpoint may watch many */
  readonly num_locations: number;
  readonly layer: number | null;
  readonly kind: BreakpointKind;
  readonly when: When;
  readonly condition: string | null;
  readonly enabled: boolean;
  readonly hits: number;
  readonly stops: number;
}

/** A breakpoint that applies to the runs that follow. */
export interface PendingBrief {
  readonly location: string;
  readonly layer: number | null;
  readonly when: When;
  readonly condition: string | null;
}

/** An edit of the current session. */
export interface EditBrief {
  readonly id: number;
  readonly kind: string;
  readonly location: string;
  readonly text: string;
  readonly sticky: boolean;
  readonly enabled: boolean;
  readonly at_this_stop: boolean;
}

/** A node of the current session's branch tree. */
export interface NodeBrief {
  readonly number: number;
  readonly parent: number | null;
  readonly location: string | null;
  readonly forward: number;
  readonly reason: Reason | null;
  readonly status: Status;
  readonly current: boolean;
  /** its tensors are kept, so going there needs no forward */
  readonly kept: boolean;
  readonly num_tokens: number;
  readonly num_edits: number;
}

/** What something holds; `tier`: `device`, `host` or `disk`. */
export interface MemoryRow {
  readonly kind: string;
  readonly tier: 'device' | 'host' | 'disk';
  readonly nbytes: number;
  readonly note: string;
}

/** Pages of a session that moved between tiers. */
export interface SwapBrief {
  /** seconds since the epoch, by the clock of the notebook's kernel */
  readonly time_s: number;
  readonly session_id: string;
  readonly nbytes: number;
  readonly text: string;
}

/** KV pages by tier, bytes; a total of 0: there is no such tier. rows: everything by kind. */
export interface MemoryBrief {
  readonly device_used: number;
  readonly device_total: number;
  readonly host_used: number;
  readonly host_total: number;
  readonly disk_used: number;
  readonly disk_total: number;
  readonly rows: readonly MemoryRow[];
  /** the newest last, bounded */
  readonly swaps: readonly SwapBrief[];
}

/** What the views look at together; None: nothing chosen. */
export interface Selection {
  readonly session_id: string | null;
  readonly layer: number | null;
  readonly head: number | null;
  /** absolute position */
  readonly token: number | null;
}

/** Something a person did, and the Python that repeats it. */
export interface ActionBrief {
  readonly number: number;
  readonly label: string;
  readonly code: string;
  readonly outcome: Outcome;
  readonly error: string | null;
}

/**
 * What is being carried out. since_s: seconds since the epoch.
 *
 * in_cell: a cell of the notebook runs meanwhile, and what is clicked in widgets waits for it.
 */
export interface Busy {
  readonly text: string;
  readonly since_s: number;
  readonly can_pause: boolean;
  readonly progress: ProgressBrief | null;
  readonly in_cell: boolean;
}

/** Everything the views show, at one moment. A view drops one that is not newer (`rev`). */
export interface Snapshot {
  readonly rev: number;
  /** tells one kernel process from another, which counts `rev` anew */
  readonly kernel: string;
  readonly connection: Connection;
  readonly address: string;
  readonly notice: Notice | null;
  /** of loading the model */
  readonly progress: ProgressBrief | null;
  readonly model: ModelBrief | null;
  /** the current session */
  readonly session_id: string | null;
  readonly sessions: readonly SessionBrief[];
  readonly breakpoints: readonly BreakpointBrief[];
  readonly pending: readonly PendingBrief[];
  readonly branches: readonly NodeBrief[];
  readonly edits: readonly EditBrief[];
  readonly memory: MemoryBrief | null;
  readonly selection: Selection;
  /** the newest last, bounded */
  readonly actions: readonly ActionBrief[];
  readonly busy: Busy | null;
  /** verbs that would not be refused now */
  readonly can: readonly string[];
}
