// The left sidebar: its parts in order, each a section that opens and closes.
import * as React from 'react';
import { ReactWidget, UseSignal } from '@jupyterlab/ui-components';
import type { TranslationBundle } from '@jupyterlab/translation';
import type { CommandRegistry } from '@lumino/commands';
import { perform } from './commands';
import type { Follower } from './follower';
import { lampIcon } from './icon';
import type { View } from './tokens';
import { Branches } from './panels/branches';
import { Breakpoints } from './panels/breakpoints';
import { Connect } from './panels/connect';
import { History } from './panels/history';
import { Layers } from './panels/layers';
import { Memory } from './panels/memory';
import type { PartProps } from './panels/parts';
import { Section } from './panels/section';
import { Controls, Sessions } from './panels/sessions';
import { State } from './panels/state';

export class Sidebar extends ReactWidget {
  constructor(
    private readonly _djinn: Follower,
    private readonly _commands: CommandRegistry,
    private readonly _trans: TranslationBundle
  ) {
    super();
    this.id = 'djinn-nb-sidebar';
    this.addClass('jp-Djinn');
    this.title.icon = lampIcon;
    this.title.caption = _trans.__('Djinn');
    // to be gone to by a command; the tab key then reaches its first button
    this.node.tabIndex = -1;
    this.node.setAttribute('role', 'region');
    this.node.setAttribute('aria-label', _trans.__('Djinn'));
  }

  protected override render(): React.ReactElement {
    return (
      <UseSignal signal={this._djinn.changed} initialArgs={this._djinn.view}>
        {(_, view) => (
          <Parts
            view={view ?? this._djinn.view}
            trans={this._trans}
            commands={this._commands}
            perform={(verb, args) => perform(this._djinn, verb, args)}
            insert={code => {
              void this._djinn.insert(code);
            }}
          />
        )}
      </UseSignal>
    );
  }
}

function Parts(
  props: PartProps & { readonly insert: (code: string) => void }
): React.ReactElement {
  const { trans, view } = props;
  const [asked, setAsked] = React.useState<'connect' | 'launch' | null>(null);
  const attached = view.link === 'attached' && view.snapshot !== null;
  const isConnected = attached && view.snapshot?.model !== null;
  return (
    <>
      <div className="jp-Djinn-header">
        <h2 className="jp-Djinn-title">{trans.__('Djinn')}</h2>
        {attached && (
          <button
            type="button"
            className="jp-Djinn-button"
            title={trans.__('Insert a cell that shows all panels together')}
            onClick={() => {
              void props.commands.execute('djinn:open_panel');
            }}
          >
            {trans.__('Open the panels')}
          </button>
        )}
      </div>
      <div className="jp-Djinn-top">
        <State {...props} ask={setAsked} />
        {attached && asked === 'connect' && (
          <Connect {...props} close={() => setAsked(null)} />
        )}
      </div>
      {isConnected && <Controls {...props} />}
      {attached && (
        <>
          <Section title={trans.__('Layers')} note={ladderNote(view, trans)}>
            <Layers {...props} key={view.snapshot?.model?.name} />
          </Section>
          <Section title={trans.__('Breakpoints')}>
            <Breakpoints {...props} />
          </Section>
          <Section title={trans.__('Sessions')}>
            <Sessions {...props} launching={asked === 'launch'} />
          </Section>
          <Section title={trans.__('Branches')}>
            <Branches {...props} />
          </Section>
          <Section title={trans.__('Memory')}>
            <Memory {...props} />
          </Section>
          <Section title={trans.__('Code')}>
            <History {...props} />
          </Section>
        </>
      )}
    </>
  );
}

function ladderNote(view: View, trans: TranslationBundle): string {
  const snapshot = view.snapshot;
  const session = snapshot?.sessions.find(
    one => one.id === snapshot.session_id
  );
  if (!snapshot?.model || !session) {
    return '';
  }
  return trans.__(
    '%1 of %2 run · forward %3',
    session.layers_executed,
    snapshot.model.num_layers,
    session.forward
  );
}
