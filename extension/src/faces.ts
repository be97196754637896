// What is wrong, or what comes next: each state says what happened and what to do.
import type { Notice, Snapshot } from './protocol';
import { currentSession } from './model';
import type { Translation, View } from './tokens';

/** What a button of a face does: a verb, a command of the lab, or something of the sidebar. */
export type Deed =
  | { readonly verb: string }
  | { readonly command: string }
  | { readonly ask: 'connect' | 'launch' }
  | { readonly local: 'dismiss' };

export interface Button {
  readonly label: string;
  readonly deed: Deed;
}

export interface Face {
  readonly code: string;
  readonly level: 'error' | 'warning' | 'info';
  /** what happened */
  readonly text: string;
  /** what to do */
  readonly advice: string;
  readonly buttons: readonly Button[];
  /** 0 to 1; null: it takes as long as it takes; undefined: nothing is under way */
  readonly progress?: number | null;
}

export const LOAD = '%load_ext djinn_nb';
const RUN = '%%djinn_run';

/** The faces to show, the most pressing first; none: all is well and something is stopped. */
export function faces(view: View, trans: Translation): Face[] {
  const first = linkFace(view, trans);
  if (first) {
    return [first];
  }
  const snapshot = view.snapshot;
  if (!snapshot) {
    return [
      {
        code: 'Waiting',
        level: 'info',
        text: trans.__('Waiting for the kernel to say how things stand.'),
        advice: trans.__('If a cell runs, that may be when it ends.'),
        buttons: [],
        progress: null
      }
    ];
  }
  const found = [
    connectionFace(snapshot, trans),
    noticeFace(snapshot, trans),
    urgentFace(view, trans),
    emptyFace(snapshot, trans)
  ];
  return found.filter(face => face !== null);
}

function linkFace(view: View, trans: Translation): Face | null {
  switch (view.link) {
    case 'attached':
      return null;
    case 'no-notebook':
      return {
        code: 'NoNotebook',
        level: 'info',
        text: trans.__('No notebook is open.'),
        advice: trans.__('Open one: Djinn shows what its kernel debugs.'),
        buttons: []
      };
    case 'no-kernel':
      return {
        code: 'NoKernel',
        level: 'warning',
        text: trans.__('This notebook has no kernel.'),
        advice: trans.__('Choose a Python kernel that has djinn_nb installed.'),
        buttons: [
          {
            label: trans.__('Choose a kernel'),
            deed: { command: 'notebook:change-kernel' }
          }
        ]
      };
    case 'starting':
      return {
        code: 'KernelStarting',
        level: 'info',
        text: trans.__('The kernel is starting, or has not answered yet.'),
        advice: trans.__('Nothing to do; this goes on by itself.'),
        buttons: [],
        progress: null
      };
    case 'dead':
      return {
        code: 'KernelDead',
        level: 'error',
        text: trans.__('The kernel of this notebook has ended.'),
        advice: trans.__(
          'Restart it and load djinn_nb again. Sessions live on in the server.'
        ),
        buttons: [
          {
            label: trans.__('Restart the kernel'),
            deed: { command: 'notebook:restart-kernel' }
          }
        ]
      };
    case 'foreign':
      return {
        code: 'NotPython',
        level: 'info',
        text: trans.__('The kernel of this notebook is not a Python kernel.'),
        advice: trans.__('Djinn debugs from Python: choose another kernel.'),
        buttons: [
          {
            label: trans.__('Choose a kernel'),
            deed: { command: 'notebook:change-kernel' }
          }
        ]
      };
    case 'not-loaded':
      return {
        code: 'NotLoaded',
        level: 'info',
        text: trans.__('djinn_nb is not loaded in this notebook.'),
        advice: trans.__(
          'Load it: the button inserts a cell with %1 and runs it.',
          LOAD
        ),
        buttons: [
          { label: trans.__('Load djinn_nb'), deed: { command: 'djinn:load' } }
        ]
      };
  }
}

function connectionFace(snapshot: Snapshot, trans: Translation): Face | null {
  const said = snapshot.notice;
  switch (snapshot.connection) {
    case 'ready':
      return null;
    case 'none':
      return {
        code: 'NotConnected',
        level: 'info',
        text: trans.__('This notebook is not connected to a server.'),
        advice: trans.__(
          'Connect: without an address it uses the server of this machine, and starts one where there is none.'
        ),
        buttons: [
          { label: trans.__('Connect'), deed: { verb: 'connect' } },
          {
            label: trans.__('Another server…'),
            deed: { ask: 'connect' }
          }
        ]
      };
    case 'connecting':
      return {
        code: 'Connecting',
        level: 'info',
        text: snapshot.address
          ? trans.__('Connecting to %1.', snapshot.address)
          : trans.__('Connecting to a server.'),
        advice: trans.__('The first start of a server loads its model.'),
        buttons: [],
        progress: null
      };
    case 'loading':
      return {
        code: 'ModelLoading',
        level: 'info',
        text:
          snapshot.progress?.text ?? trans.__('The server loads its model.'),
        advice: trans.__('You can go on as soon as it is there.'),
        buttons: [],
        progress: snapshot.progress?.done ?? null
      };
    case 'lost':
      return {
        code: 'ConnectionLost',
        level: 'error',
        text: said?.text ?? trans.__('The connection to the server is lost.'),
        advice:
          said?.advice ??
          trans.__(
            'It is tried again by itself; sessions live on in the server.'
          ),
        buttons: [
          { label: trans.__('Connect'), deed: { verb: 'connect' } },
          { label: trans.__('Another server…'), deed: { ask: 'connect' } }
        ]
      };
    case 'denied':
      return {
        code: 'AccessDenied',
        level: 'error',
        text: said?.text ?? trans.__('The server refuses the access token.'),
        advice:
          said?.advice ??
          trans.__(
            'Give the token from the token file on the server’s machine.'
          ),
        buttons: [
          { label: trans.__('Give a token…'), deed: { ask: 'connect' } }
        ]
      };
  }
}

function noticeFace(snapshot: Snapshot, trans: Translation): Face | null {
  const said = snapshot.notice ?? takenOver(snapshot, trans);
  // told by the face of the connection already
  if (!said || ['lost', 'denied'].includes(snapshot.connection)) {
    return null;
  }
  if (said.code === 'NotConnected') {
    return null;
  }
  const look = { label: trans.__('Look again'), deed: { verb: 'look' } };
  const dismiss = {
    label: trans.__('Dismiss'),
    deed: { local: 'dismiss' } as const
  };
  return {
    code: said.code,
    level: said.level,
    text: said.text,
    advice: said.advice,
    buttons: said.code === 'TakenOver' ? [look] : [dismiss]
  };
}

/** Another client moved the current session, and the kernel had nothing else to say. */
function takenOver(snapshot: Snapshot, trans: Translation): Notice | null {
  const session = currentSession(snapshot);
  if (!session?.taken_over) {
    return null;
  }
  return {
    code: 'TakenOver',
    level: 'warning',
    text: trans.__('Another client has moved session %1.', session.id),
    advice: trans.__('Look again, to go on from where it is now.')
  };
}

function urgentFace(view: View, trans: Translation): Face | null {
  if (view.waiting) {
    return {
      code: 'WaitingForKernel',
      level: 'warning',
      text: trans.__('What you asked for waits until the kernel’s cell ends.'),
      advice: trans.__(
        'This kernel has no subshells. Interrupt it to go on at once; nothing is lost.'
      ),
      buttons: [
        {
          label: trans.__('Interrupt the kernel'),
          deed: { command: 'notebook:interrupt-kernel' }
        }
      ],
      progress: null
    };
  }
  if (view.urgent) {
    return null;
  }
  return {
    code: 'NoSubshells',
    level: 'info',
    text: trans.__('This kernel has no subshells.'),
    advice: trans.__(
      'While a cell runs, Pause waits for it; interrupt the kernel to stop at once. ipykernel 7 or later has them.'
    ),
    buttons: []
  };
}

function emptyFace(snapshot: Snapshot, trans: Translation): Face | null {
  if (snapshot.connection !== 'ready' || snapshot.notice?.level === 'error') {
    return null;
  }
  const session = currentSession(snapshot);
  if (session === null) {
    return {
      code: 'NothingStopped',
      level: 'info',
      text: trans.__('Nothing is stopped.'),
      advice: trans.__(
        'Click a layer to set a breakpoint, then run a prompt, here or with %1 in a cell.',
        RUN
      ),
      buttons: [{ label: trans.__('Run a prompt…'), deed: { ask: 'launch' } }]
    };
  }
  return null;
}
