// What the extension offers others, and the words it shares: link states, verbs, translations.
import { Token } from '@lumino/coreutils';
import type { ISignal } from '@lumino/signaling';
import type { Snapshot } from './protocol';

/** What a notebook's kernel answered, from `djinn_nb.comm_bridge`. */
export interface Answer {
  readonly ok: boolean;
  /** why not, in words; null when it was done */
  readonly error: string | null;
}

/**
 * How the notebook in front stands to djinn_nb: no notebook; no kernel; a kernel that starts or is
 * asked; one that is gone; one of another language; djinn_nb not loaded; attached.
 */
export type LinkState =
  | 'no-notebook'
  | 'no-kernel'
  | 'starting'
  | 'dead'
  | 'foreign'
  | 'not-loaded'
  | 'attached';

/** Everything the views draw: the kernel's newest snapshot, and whether there can be one. */
export interface View {
  readonly link: LinkState;
  /** name of the notebook in front */
  readonly notebook: string;
  readonly snapshot: Snapshot | null;
  /** pause and terminate reach a kernel whose cell runs */
  readonly urgent: boolean;
  /** an urgent control that has to wait for the kernel */
  readonly waiting: boolean;
}

export type Arguments = Readonly<
  Record<string, string | number | boolean | null>
>;

/** The debugger of the notebook in front. */
export interface IDjinn {
  readonly view: View;
  readonly changed: ISignal<unknown, View>;
  /** Have the kernel carry out a verb of `djinn_nb.verbs`. */
  do(verb: string, args?: Arguments): Promise<Answer>;
}

export const IDjinn = new Token<IDjinn>(
  'djinn-nb:IDjinn',
  'The debugger of the notebook in front: its newest snapshot, and verbs for its kernel.'
);

/** The part of a translation bundle that models need. */
export interface Translation {
  __(text: string, ...values: (string | number)[]): string;
  _n(
    singular: string,
    plural: string,
    count: number,
    ...values: (string | number)[]
  ): string;
}
