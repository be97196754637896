// Every command, `djinn:verb`: its words, its icon, and when it can be used.
import type { CommandRegistry } from '@lumino/commands';
import type { TranslationBundle } from '@jupyterlab/translation';
import type { LabIcon } from '@jupyterlab/ui-components';
import {
  clearIcon,
  closeIcon,
  codeIcon,
  duplicateIcon,
  historyIcon,
  jumpBackIcon,
  linkIcon,
  pauseIcon,
  runIcon,
  stepIntoIcon,
  stepOutIcon,
  stepOverIcon,
  tableRowsIcon,
  undoIcon
} from '@jupyterlab/ui-components';
import { Notification } from '@jupyterlab/apputils';
import { lampIcon } from './icon';
import { LOAD } from './faces';
import type { Follower } from './follower';
import type { Arguments, View } from './tokens';

const PANELS = '%djinn_panel';
export const OPEN_SIDEBAR = 'djinn:open_sidebar';
/** Of the run controls, in the order they are shown. */
export const CONTROLS = [
  'djinn:continue',
  'djinn:pause',
  'djinn:next',
  'djinn:step_in',
  'djinn:step_out',
  'djinn:step_back',
  'djinn:fork',
  'djinn:terminate'
];

interface Words {
  readonly label: string;
  readonly caption: string;
  readonly icon: LabIcon;
}

/** Verbs that take no argument, or whose arguments all have a default. */
function verbs(trans: TranslationBundle): Record<string, Words> {
  return {
    connect: {
      label: trans.__('Connect to a Server'),
      caption: trans.__(
        'Connect to the server of this machine; start one where there is none'
      ),
      icon: linkIcon
    },
    continue: {
      label: trans.__('Continue'),
      caption: trans.__('Run on until something stops the session'),
      icon: runIcon
    },
    pause: {
      label: trans.__('Pause'),
      caption: trans.__(
        'Stop at the next layer boundary, also while a cell runs'
      ),
      icon: pauseIcon
    },
    next: {
      label: trans.__('Next layer'),
      caption: trans.__('Run to the next layer’s output'),
      icon: stepOverIcon
    },
    step_in: {
      label: trans.__('Step in'),
      caption: trans.__('Run to the next site, inside the layer or at its end'),
      icon: stepIntoIcon
    },
    step_out: {
      label: trans.__('Step out'),
      caption: trans.__(
        'Run to this forward’s logits, before the next token is sampled'
      ),
      icon: stepOutIcon
    },
    step_back: {
      label: trans.__('Step back'),
      caption: trans.__('Return to the previous stop'),
      icon: jumpBackIcon
    },
    fork: {
      label: trans.__('Fork'),
      caption: trans.__('Copy the session as it stands, and go on in the copy'),
      icon: duplicateIcon
    },
    terminate: {
      label: trans.__('Terminate'),
      caption: trans.__('End the session and free what it holds'),
      icon: closeIcon
    },
    undo: {
      label: trans.__('Undo the Last Edit'),
      caption: trans.__('Take back the last edit made at this stop'),
      icon: undoIcon
    },
    look: {
      label: trans.__('Look Again'),
      caption: trans.__('See where another client has moved the session'),
      icon: historyIcon
    },
    clear_breakpoints: {
      label: trans.__('Remove All Breakpoints'),
      caption: trans.__('Remove all breakpoints, of runs to come too'),
      icon: clearIcon
    }
  };
}

/** What a verb of the registry takes, for those who call it from elsewhere. */
const SESSION = {
  args: {
    type: 'object' as const,
    properties: {
      session: {
        type: 'string' as const,
        description: 'the id of a session; left out: the current one'
      },
      toolbar: {
        type: 'boolean' as const,
        description: 'whether it is hidden where djinn_nb is not loaded'
      }
    }
  }
};
const NO_ARGUMENTS = {
  args: { type: 'object' as const, properties: {} }
};
const TAKE_A_SESSION = [
  ...['continue', 'next', 'step_in', 'step_out', 'step_back'],
  ...['pause', 'fork', 'terminate']
];

/** Whether a verb would not be refused now. */
export function isPossible(view: View, verb: string): boolean {
  return view.snapshot?.can.includes(verb) ?? false;
}

/** Carry out a verb, and tell the user when it was refused and no view would. */
export async function perform(
  djinn: Follower,
  verb: string,
  args: Arguments = {}
): Promise<boolean> {
  const answer = await djinn.do(verb, args);
  // an error of the kernel's is in its next snapshot too; one of the way there is only here
  if (!answer.ok && answer.error && !djinn.view.snapshot?.notice) {
    Notification.error(answer.error, { autoClose: 8000 });
  }
  return answer.ok;
}

/** Add all commands; returns their ids. */
export function addCommands(
  commands: CommandRegistry,
  djinn: Follower,
  trans: TranslationBundle,
  enterSidebar: () => void
): string[] {
  const ids: string[] = [];
  for (const [verb, words] of Object.entries(verbs(trans))) {
    const takesSession = TAKE_A_SESSION.includes(verb);
    const id = `djinn:${verb}`;
    ids.push(id);
    commands.addCommand(id, {
      ...words,
      isEnabled: () => isPossible(djinn.view, verb),
      isVisible: args => !args['toolbar'] || djinn.view.link === 'attached',
      describedBy: takesSession ? SESSION : NO_ARGUMENTS,
      execute: args => {
        const session = args['session'];
        return perform(
          djinn,
          verb,
          takesSession && typeof session === 'string' ? { session } : {}
        );
      }
    });
  }
  commands.addCommand('djinn:toggle_breakpoint', {
    label: trans.__('Toggle a Breakpoint'),
    caption: trans.__('Set a breakpoint at a location, or at the chosen layer'),
    icon: lampIcon,
    isEnabled: args =>
      isPossible(djinn.view, 'toggle_breakpoint') &&
      (args['location'] !== undefined ||
        typeof djinn.view.snapshot?.selection.layer === 'number'),
    describedBy: {
      args: {
        type: 'object',
        properties: {
          location: {
            type: 'string',
            description: 'such as layers.20.output; left out: the chosen layer'
          }
        }
      }
    },
    execute: args => {
      const layer = djinn.view.snapshot?.selection.layer;
      const location = args['location'] ?? `layers.${layer}.output`;
      return perform(djinn, 'toggle_breakpoint', {
        location: String(location)
      });
    }
  });
  commands.addCommand('djinn:load', {
    label: trans.__('Load djinn_nb'),
    caption: trans.__('Insert a cell with %1 and run it', LOAD),
    icon: codeIcon,
    isEnabled: () => djinn.view.link === 'not-loaded',
    describedBy: NO_ARGUMENTS,
    execute: () => djinn.insert(LOAD, true)
  });
  commands.addCommand('djinn:open_panel', {
    label: trans.__('Open the Panels'),
    caption: trans.__(
      'Insert a cell that shows all panels together, and run it'
    ),
    icon: tableRowsIcon,
    isEnabled: () => djinn.view.link === 'attached',
    describedBy: NO_ARGUMENTS,
    execute: () => djinn.insert(PANELS, true)
  });
  commands.addCommand(OPEN_SIDEBAR, {
    label: trans.__('Show the Sidebar'),
    caption: trans.__('Show the Djinn sidebar, and go to it'),
    icon: lampIcon,
    describedBy: NO_ARGUMENTS,
    execute: enterSidebar
  });
  ids.push('djinn:toggle_breakpoint', 'djinn:load');
  ids.push('djinn:open_panel', OPEN_SIDEBAR);
  djinn.changed.connect(() => {
    for (const id of ids) {
      commands.notifyCommandChanged(id);
    }
  });
  return ids;
}
